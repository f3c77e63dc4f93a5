"""Timing kernels on random operands, as a program would run them.

On GPUs products are timed in a chain: each waits for the one before, as in a model.  MLX runs side
by side what does not wait, which hides what a kernel leaves idle.  The host is ahead as in a model:
the chain waits for something that takes the GPU longer than the host takes to send all of it.  What
that takes, and what joins products whose result is smaller than x, is taken off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
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
LENGTH, TURNS = 16, 4
"""Products of a chain that are compiled as one function, on GPUs, and how often it is called."""
SLOW = 0.006
"""Seconds; a chain that takes longer is called once: what is sent ahead takes memory."""
WAITING = 8192
"""Rows and columns of the matrices whose product, some 3 ms, chains wait for on GPUs."""
ALONE = {TURNS: "alone", 1: "alone once"}
"""Names of the chains without products, by their turns."""


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
        for name in set(chains) - set(ALONE.values()):
            try:
                chains[name].settle()
            except (RuntimeError, ValueError) as error:
                warnings.warn(f"{name} fails for {problem}: {error}", stacklevel=2)
                del chains[name]
        timings = interleaved(chains, repeats, warmup, hopeless=HOPELESS, beside=ALONE.values())
    alone = {turns: timings.pop(name).median for turns, name in ALONE.items() if name in timings}
    return {
        name: Timing(tuple(_each(chains[name], s, alone) for s in timing.seconds))
        for name, timing in timings.items()
    }


def _each(chain: Chain, seconds: float, alone: Mapping[int, float]) -> float:
    """Seconds of a product of a chain that took so many, less what it takes without products."""
    return max(0.0, seconds - alone.get(chain.turns, 0.0)) / (chain.length * chain.turns)


class Chain:
    """Products that wait for one another; a call carries them out and waits for the last.

    Attributes:
        length: products of one call of `function`.
        turns: its calls.
        before: what the first product waits for.
    """

    def __init__(
        self,
        function: Callable[[mx.array], list[mx.array]],
        x: mx.array,
        length: int = 1,
        before: Callable[[], mx.array] | None = None,
        turns: int = 1,
    ) -> None:
        self.function, self.x, self.length, self.before = function, x, length, before
        self.turns = turns

    def __call__(self) -> None:
        y = self.x if self.before is None else self.before()
        for _ in range(self.turns):
            mx.async_eval(y)  # type: ignore[no-untyped-call]
            (y,) = self.function(after(self.x, y))
        mx.eval(y)

    def settle(self) -> None:
        """Runs it until all is compiled, and says how often it is called."""
        self.turns = 1
        self()
        if self.before is not None and once(self) < SLOW:
            self.turns = TURNS


def chains_of(
    problem: Problem, names: Iterable[str], x: mx.array, parts: list[mx.array], target: Target
) -> dict[str, Chain]:
    """Chains of products by each kernel, and on GPUs those without; on CPUs of one product each.

    Each row of x goes to an expert drawn at random.
    """
    from ..streams import Streams

    streams = Streams(target.device)
    on_cpu = problem.backend == "cpu"
    length, before = (1, None) if on_cpu else (LENGTH, _something_long())
    copies = min(length, 1 + CACHES // problem.packed_bytes)
    weights = [parts, *([part + 0 for part in parts] for _ in range(1, copies))]
    high = max(1, problem.experts)
    experts = mx.random.randint(0, high, (problem.m,), mx.uint32, key=mx.random.key(7))
    mx.eval(weights, experts)

    def by(name: str) -> Chain:
        chosen = kernel(name)

        def product(own: list[mx.array]) -> Product:
            packed = chosen.pack(own, problem)
            mx.eval(packed)
            bound = chosen.bind(packed, problem, streams)
            return (lambda x: bound(x[:, None], None, experts)) if problem.experts else bound

        function = _in_turn([product(own) for own in weights], length)
        return Chain(function if chosen.host else Compiled(function).call, x, length, before)

    def nothing(x: mx.array) -> mx.array:
        return x.reshape(-1)[: problem.m * problem.n]

    chains = {name: by(name) for name in names}
    if not on_cpu:
        for turns, name in ALONE.items():
            chains[name] = Chain(_in_turn([nothing], length), x, length, before, turns)
    return chains


Product = Callable[[mx.array], mx.array]


def _in_turn(products: Sequence[Product], length: int) -> Callable[[mx.array], list[mx.array]]:
    """A function of so many products, of x and what the one before left."""

    def call(x: mx.array) -> list[mx.array]:
        first, *others = islice(cycle(products), length)
        y = first(x)
        for multiply in others:
            x = after(x, y)
            y = multiply(x)
        return [y]

    return call


def _something_long() -> Callable[[], mx.array]:
    """Gives numbers like those of x, when the GPU has worked for some milliseconds."""
    keys = mx.random.split(mx.random.key(1))
    a, b = (mx.random.normal((WAITING, WAITING), mx.bfloat16, key=key) for key in keys)
    b = b * WAITING**-0.5
    mx.eval(a, b)
    return lambda: (a @ b) @ b


def after(x: mx.array, y: mx.array) -> mx.array:
    """An array like x, of y's numbers, so that it is there when y is.

    Costs nothing where y has as many numbers; else they are copied.
    """
    if y.shape == x.shape and y.dtype == x.dtype:
        return y
    if y.size < x.size:
        y = mx.broadcast_to(y.reshape(-1), (-(-x.size // y.size), y.size))
    return y.reshape(-1)[: x.size].reshape(x.shape).astype(x.dtype)
