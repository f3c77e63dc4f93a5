"""Timing kernels on random operands, as a program would run them.

On GPUs products are timed in a chain: each waits for the one before, and the host is ahead, as in a
model.  MLX runs side by side what does not wait, which hides what a kernel leaves idle.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from typing import Any

import mlx.core as mx

from ...target import Target, as_target
from ...timing import Timing, interleaved
from .. import Problem, kernel
from ..compiled import Compiled

HOPELESS = 6.0
"""A candidate this many times slower than the best in its warm-up is not run again."""
CACHES = 256 << 20
"""Bytes of weights that no GPU's cache holds: one used again within them is read from memory."""


def random_operands(problem: Problem, seed: int = 0) -> tuple[mx.array, list[mx.array]]:
    """x (m, k) and packed parts, evaluated: random numbers of which x W^T is as large as x."""
    key_x, key_w = mx.random.split(mx.random.key(seed))
    shape: tuple[int, ...] = (problem.n, problem.k)
    shape = shape if problem.transpose else shape[::-1]
    if problem.experts:
        shape = (problem.experts, *shape)
    w_dtype = problem.scales_dtype if problem.mode == "affine" else problem.dtype
    w = (mx.random.normal(shape, key=key_w) * problem.k**-0.5).astype(w_dtype)
    parts = list(mx.quantize(w, **problem.settings))
    x = mx.random.normal((problem.m, problem.k), key=key_x).astype(problem.dtype)
    mx.eval(x, parts)
    return x, parts


def measure(
    problem: Problem,
    names: Iterable[str],
    *,
    repeats: int = 7,
    warmup: int = 2,
    target: Target | None = None,
) -> dict[str, Timing]:
    """Time kernels on random operands, in turn; each under `mx.compile` as in a program.

    A kernel that MLX fails to run is left out, with a warning that says why.

    Args:
        target: where to run, by default MLX's default device.
    """
    target = target or as_target()
    with mx.stream(mx.default_stream(target.device)):
        x, parts = random_operands(problem)
        functions = runs(problem, names, x, parts, target)
        for name in list(functions):
            try:
                functions[name]()
            except (RuntimeError, ValueError) as error:
                warnings.warn(f"{name} fails for {problem}: {error}", stacklevel=2)
                del functions[name]
        timings = interleaved(functions, repeats, warmup, hopeless=HOPELESS)
    length, turns = chain(problem)
    return {
        name: Timing(tuple(s / (length * turns) for s in timing.seconds))
        for name, timing in timings.items()
    }


def chain(problem: Problem) -> tuple[int, int]:
    """Products in one compiled function, and its calls in one run."""
    if problem.backend == "cpu":
        return 1, 1
    return (10, 12) if problem.m <= 128 else (5, 4)  # the host needs some 5 µs a product


def runs(
    problem: Problem, names: Iterable[str], x: mx.array, parts: list[mx.array], target: Target
) -> dict[str, Callable[[], Any]]:
    """For each kernel a function that carries out `chain(problem)` products and waits for them.

    Each row of x goes to an expert drawn at random.
    """
    from ..streams import Streams

    streams = Streams(target.device)
    length, turns = chain(problem)
    copies = min(length, 1 + CACHES // problem.packed_bytes)
    weights = [parts, *([part + 0 for part in parts] for _ in range(1, copies))]
    high = max(1, problem.experts)
    experts = mx.random.randint(0, high, (problem.m,), mx.uint32, key=mx.random.key(7))
    mx.eval(weights, experts)

    def prepared(name: str) -> Callable[[], Any]:
        chosen = kernel(name)

        def product(own: list[mx.array]) -> Callable[[mx.array], mx.array]:
            packed = chosen.pack(own, problem)
            mx.eval(packed)
            bound = chosen.bind(packed, problem, streams)
            return (lambda x: bound(x[:, None], None, experts)) if problem.experts else bound

        products = [product(own) for own in weights]

        def call(x: mx.array) -> list[mx.array]:
            first, *others = islice(cycle(products), length)
            y = first(x)
            for multiply in others:
                y = multiply(after(x, y))
            return [y]

        function = call if chosen.host else Compiled(call).call

        def run() -> None:
            (y,) = function(x)
            for _ in range(1, turns):
                mx.async_eval(y)  # type: ignore[no-untyped-call]
                (y,) = function(after(x, y))
            mx.eval(y)

        return run

    return {name: prepared(name) for name in names}


def after(x: mx.array, y: mx.array) -> mx.array:
    """An array like x that is there when y is: of y's numbers, or where they are too few x itself.

    The first costs nothing, the second a small operation.
    """
    if y.size >= x.size and y.dtype == x.dtype:
        return y.reshape(-1)[: x.size].reshape(x.shape)
    return x + 0 * y.reshape(-1)[:1].astype(x.dtype)
