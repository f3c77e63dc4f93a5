"""Choosing a kernel: from a cache of measurements, a shipped table, a cost model, or by measuring.

Sources, in this order: what was measured on this machine before ("cache"); with `tune`, measuring
now ("measured"); the shipped table, where it holds this very problem ("table"); the cost model
("model"); and, with nothing known about the target, plain `qmm` ("default").
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ...target import Target, as_target
from ...timing import Timing, interleaved
from .. import Problem, candidates, kernel
from ..compiled import Compiled
from .cache import Cache
from .cost import CostTable, table_for

HOPELESS = 6.0
"""A candidate this many times slower than the best in its warm-up is not run again."""


@dataclass(frozen=True)
class Choice:
    """A kernel and why it was chosen.

    Attributes:
        kernel: its name.
        source: "cache", "measured", "table", "model" or "default".
        estimate_us: microseconds it takes; NaN for "default".
        others: the candidates it won against with their microseconds, fastest first.
    """

    kernel: str
    source: str
    estimate_us: float
    others: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        rest = ", ".join(f"{name} {us:.0f}" for name, us in self.others[:3])
        return f"{self.kernel} {self.estimate_us:.0f} µs ({self.source}; {rest or 'no other'})"


def choose(
    problem: Problem,
    *,
    budget: int = 0,
    exact: bool = False,
    tune: bool = False,
    names: Sequence[str] | None = None,
    cache: Cache | None = None,
    table: CostTable | None = None,
) -> Choice:
    """The fastest kernel for a problem.

    Args:
        budget: bytes beyond the packed weight that this product may keep.
        exact: only kernels whose result is that of `mx.quantized_matmul` bit for bit.
        tune: measure what the cache does not hold, and remember it.  Above 16 rows the next power
            of two is measured in place of the very number, so that prompts of many lengths share
            their measurements.
        names: kernels to choose from; by default all that apply.
        cache: of measurements; by default the user's.
        table: by default the one shipped for the target.

    >>> choose(Problem(1, 64, 64, mx.float32, "affine", 4, 64), exact=True, names=["qmm"]).kernel
    'qmm'
    """
    names = candidates(problem, budget=budget, exact=exact) if names is None else list(names)
    if not problem.m or (len(names) == 1 and not tune):
        return Choice(names[0], "default", math.nan)
    cache = Cache.user() if cache is None else cache
    for asked in dict.fromkeys((problem, bucket(problem))):
        known = cache.get(asked)
        if all(name in known for name in names):
            return _best({name: known[name] for name in names}, "cache")
    if tune:
        timings = measure(bucket(problem), names)
        found = {name: 1e6 * timing.median for name, timing in timings.items()}
        cache.put(bucket(problem), found)
        return _best(found, "measured")
    table = table or table_for(problem)
    exactly = {name: table.measured(name, problem) for name in names}
    if all(us is not None for us in exactly.values()):
        return _best(_known(exactly), "table")
    modelled = _known({name: estimate(name, problem, table) for name in names})
    plain = names[0]  # MLX's own
    if plain not in modelled:
        return Choice(plain, "default", math.nan)
    return _best(modelled, "model")


def bucket(problem: Problem) -> Problem:
    """The problem whose measurements stand for this one's.

    >>> [bucket(Problem(m, 64, 64, mx.float32, "affine", 4, 64)).m for m in (3, 16, 37, 512)]
    [3, 16, 64, 512]
    """
    m = problem.m
    return problem if m <= 16 else problem.replace(m=1 << (m - 1).bit_length())


def estimate(name: str, problem: Problem, table: CostTable | None = None) -> float | None:
    """Microseconds of a kernel by the shipped table or the cost model; None if neither knows."""
    return kernel(name).estimate(problem, table or table_for(problem))


def _known(found: Mapping[str, float | None]) -> dict[str, float]:
    return {name: us for name, us in found.items() if us is not None}


def _best(found: Mapping[str, float], source: str) -> Choice:
    first, *others = sorted(found.items(), key=lambda item: item[1])
    return Choice(first[0], source, first[1], tuple(others))


def random_operands(problem: Problem, seed: int = 0) -> tuple[mx.array, list[mx.array]]:
    """x (m, k) and packed parts for a problem, of normal numbers, evaluated."""
    key_x, key_w = mx.random.split(mx.random.key(seed))
    shape: tuple[int, ...] = (problem.n, problem.k)
    shape = shape if problem.transpose else shape[::-1]
    if problem.experts:
        shape = (problem.experts, *shape)
    w_dtype = problem.scales_dtype if problem.mode == "affine" else problem.dtype
    w = mx.random.normal(shape, key=key_w).astype(w_dtype)
    parts = list(mx.quantize(w, **problem.settings))
    x = mx.random.normal((problem.m, problem.k), key=key_x).astype(problem.dtype)
    mx.eval(x, parts)
    return x, parts


def runs(
    problem: Problem, names: Iterable[str], x: mx.array, parts: Sequence[mx.array], target: Target
) -> dict[str, Callable[[], Any]]:
    """For each kernel a function that carries out the product on x and waits for it.

    On GPUs it does so `calls_at_once(problem)` times, each on a copy of x and of the weight: one
    product is over before the next is sent, and a weight used again would be in the cache.
    Each row of x goes to an expert drawn at random.
    """
    from ..streams import Streams

    streams = Streams(target.device)
    copies = [(x, list(parts))]
    for _ in range(1, calls_at_once(problem)):
        copies.append((x + 0, [part + 0 for part in parts]))
    high = max(1, problem.experts)
    experts = mx.random.randint(0, high, (problem.m,), mx.uint32, key=mx.random.key(7))
    mx.eval(copies, experts)

    def prepared(name: str) -> Callable[[], Any]:
        chosen = kernel(name)
        packed = [chosen.pack(own, problem) for _, own in copies]
        mx.eval(packed)

        def product(own: Sequence[mx.array]) -> Callable[[mx.array], mx.array]:
            bound = chosen.bind(own, problem, streams)
            return (lambda x: bound(x[:, None], None, experts)) if problem.experts else bound

        products = [product(own) for own in packed]

        def call(*xs: mx.array) -> list[mx.array]:
            return [run(x) for run, x in zip(products, xs, strict=True)]

        function = call if chosen.host else Compiled(call).call
        return lambda: mx.eval(function(*(x for x, _ in copies)))

    return {name: prepared(name) for name in names}


def calls_at_once(problem: Problem) -> int:
    """Products in one run of what `runs` gives."""
    if problem.backend == "cpu":
        return 1
    return 20 if problem.m <= 128 else 5


def measure(
    problem: Problem,
    names: Sequence[str],
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
    calls = calls_at_once(problem)
    return {name: Timing(tuple(s / calls for s in t.seconds)) for name, t in timings.items()}
