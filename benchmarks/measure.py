"""Timing on noisy machines: in turn, medians, ratios within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one candidate."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


def paired_ratio(a: Timing, b: Timing) -> float:
    """Median over the rounds of a's time by b's: what drifts slowly cancels in each round."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int = 9,
    warmup: int = 2,
    inner: int = 1,
) -> dict[str, Timing]:
    """Time candidates in turn, A B C A B C …, so that a drift of the machine hits all alike.

    Args:
        candidates: functions that return once their work is done (`mx.eval` in them).
        repeats: timed rounds; each candidate runs once in each.
        warmup: rounds before, not timed.
        inner: calls in each timed run; seconds are those of one call.
    """
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(inner):
                run()
            seconds[name].append((time.perf_counter() - start) / inner)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def print_table(title: str, results: Mapping[str, Timing], baseline: str | None = None) -> None:
    """Medians in milliseconds, and each over the baseline's (by default the first)."""
    base = results[baseline or next(iter(results))]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("ms", "ratio", "spread"):
        table.add_column(heading, justify="right")
    for name, timing in results.items():
        table.add_row(
            name,
            milliseconds(timing.median),
            f"{paired_ratio(timing, base):.3f}",
            f"±{50 * timing.spread:.0f} %",
        )
    Console(width=100).print(table)
