"""Timing kernels on random operands, as a program would run them.

On GPUs products are timed in a chain: each waits for the one before, and the host is ahead, as in a
model.  MLX runs side by side what does not wait, which hides what a kernel leaves idle.  A chain is
long, for the GPU idles until the host has sent what comes first, a tenth of a millisecond.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import cycle, islice

import mlx.core as mx

from ...target import Target, as_target
from ...timing import Timing, interleaved, once
from .. import Problem, kernel
from ..compiled import Compiled

HOPELESS = 6.0
"""A candidate this many times slower than the best in its warm-up is not run again."""
CACHES = 256 << 20
"""Bytes of weights that no GPU's cache holds: one used again within them is read from memory."""
LENGTH = 16
"""Products of a chain that are compiled as one function, on GPUs."""
LONG = 0.012
"""Seconds of a chain on a GPU, at least."""


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
        chains = chains_of(problem, names, x, parts, target)
        for name in list(chains):
            try:
                chains[name].lengthen()
            except (RuntimeError, ValueError) as error:
                warnings.warn(f"{name} fails for {problem}: {error}", stacklevel=2)
                del chains[name]
        timings = interleaved(chains, repeats, warmup, hopeless=HOPELESS) if chains else {}
    return {
        name: Timing(tuple(s / chains[name].products for s in timing.seconds))
        for name, timing in timings.items()
    }


class Chain:
    """Products that wait for one another; a call carries them out and waits for the last.

    Attributes:
        length: products of one call of `function`.
        turns: its calls.
    """

    def __init__(
        self, function: Callable[[mx.array], list[mx.array]], x: mx.array, length: int
    ) -> None:
        self.function, self.x, self.length = function, x, length
        self.turns = 1

    @property
    def products(self) -> int:
        return self.length * self.turns

    def __call__(self) -> None:
        (y,) = self.function(self.x)
        for _ in range(1, self.turns):
            mx.async_eval(y)  # type: ignore[no-untyped-call]
            (y,) = self.function(after(self.x, y))
        mx.eval(y)

    def lengthen(self) -> None:
        """More turns, until it takes `LONG`; a chain of one product, as on CPUs, stays as it is."""
        self()
        while self.length > 1 and (seconds := once(self)) < LONG:
            self.turns = min(4 * self.turns, int(1.25 * self.turns * LONG / seconds) + 1)


def chains_of(
    problem: Problem, names: Iterable[str], x: mx.array, parts: list[mx.array], target: Target
) -> dict[str, Chain]:
    """A chain of products by each kernel; each row of x goes to an expert drawn at random."""
    from ..streams import Streams

    streams = Streams(target.device)
    length = 1 if problem.backend == "cpu" else LENGTH
    copies = min(length, 1 + CACHES // problem.packed_bytes)
    weights = [parts, *([part + 0 for part in parts] for _ in range(1, copies))]
    high = max(1, problem.experts)
    experts = mx.random.randint(0, high, (problem.m,), mx.uint32, key=mx.random.key(7))
    mx.eval(weights, experts)

    def chain(name: str) -> Chain:
        chosen = kernel(name)

        def product(own: list[mx.array]) -> Callable[[mx.array], mx.array]:
            packed = chosen.pack(own, problem)
            mx.eval(packed)
            bound = chosen.bind(packed, problem, streams)
            return (lambda x: bound(x[:, None], None, experts)) if problem.experts else bound

        first, *others = islice(cycle([product(own) for own in weights]), length)

        def call(x: mx.array) -> list[mx.array]:
            y = first(x)
            for multiply in others:
                x = after(x, y)
                y = multiply(x)
            return [y]

        return Chain(call if chosen.host else Compiled(call).call, x, length)

    return {name: chain(name) for name in names}


def after(x: mx.array, y: mx.array) -> mx.array:
    """An array like x that is there when y is: of y's numbers, or where they are too few x itself.

    The first costs nothing, the second a copy of one number.
    """
    if y.shape == x.shape and y.dtype == x.dtype:
        return y
    if y.size >= x.size and y.dtype == x.dtype:
        return y.reshape(-1)[: x.size].reshape(x.shape)
    waiting = x[...]
    waiting[0, 0] = y.reshape(-1)[0].astype(x.dtype)
    return waiting
