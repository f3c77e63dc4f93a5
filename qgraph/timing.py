"""Timing on noisy machines: in turn, medians, ratios within one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

CHEAP = 0.02
"""Seconds; a candidate that is faster is never hopeless."""


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one candidate."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The shortest: what others do on the machine only adds to a time."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


def paired_ratio(a: Timing, b: Timing) -> float:
    """Median over the rounds of a's time by b's: what drifts slowly cancels in each round."""
    if len(a.seconds) != len(b.seconds):
        return a.median / b.median
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def once(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int = 9,
    warmup: int = 2,
    inner: int = 1,
    hopeless: float | None = None,
    beside: Collection[str] = (),
) -> dict[str, Timing]:
    """Time candidates in turn, A B C A B C …, so that a drift of the machine hits all alike.

    Args:
        candidates: functions that return once their work is done (`mx.eval` in them).
        repeats: timed rounds; each candidate runs once in each.
        warmup: rounds before, not timed.
        inner: calls in each timed run; seconds are those of one call.
        hopeless: a candidate whose last warm-up took this many times the fastest one's is not
            run again; that one time is its result.
        beside: those that are no candidates: none is hopeless next to them.

    >>> sorted(interleaved({"a": lambda: sum(range(9)), "b": lambda: None}, repeats=3))
    ['a', 'b']
    """
    warm: dict[str, float] = {}

    def limit() -> float:
        """Seconds beyond which one is hopeless."""
        known = [s for name, s in warm.items() if name not in beside]
        return max(hopeless * min(known), CHEAP) if hopeless and known else math.inf

    for _ in range(max(warmup, 1 if hopeless else 0)):
        for name, run in candidates.items():
            if warm.get(name, 0.0) <= limit():
                warm[name] = once(run)
    most = limit()
    seconds = {name: [warm[name]] if warm.get(name, 0) > most else [] for name in candidates}
    running = [name for name, given in seconds.items() if not given]
    for _ in range(repeats):
        for name in running:
            run = candidates[name]
            start = time.perf_counter()
            for _ in range(inner):
                run()
            seconds[name].append((time.perf_counter() - start) / inner)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}
