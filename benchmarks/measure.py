"""Tables of timings; the timing itself is `qgraph.timing`."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from qgraph.timing import Timing, interleaved, paired_ratio

__all__ = ["Timing", "interleaved", "milliseconds", "paired_ratio", "print_table"]


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
