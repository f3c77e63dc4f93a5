"""Choosing a kernel: from a cache of measurements, a shipped table, a cost model, or by measuring.

Sources, in this order: what was measured on this machine before ("cache"); with `tune`, measuring
now ("measured"); the shipped table, where it holds this very problem ("table"); the cost model
("model"); and, with nothing known about the target, plain `qmm` ("default").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import Problem, candidates, kernel
from .cache import Cache
from .cost import CostTable, table_for
from .measuring import measure


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

    >>> import mlx.core as mx
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

    >>> import mlx.core as mx
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
