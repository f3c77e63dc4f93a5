"""The rows that are kept, as a table on the screen, as one in Markdown, and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.machine import RESULTS

from .row import METHODS

FILE = RESULTS / "quality.json"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "quality.svg"

Row = dict[str, Any]


def kept(model: str, tokens: int) -> list[Row]:
    """The rows of a model, fitted on so many tokens."""
    return [row for row in read() if row["model"] == model and row["tokens"] == tokens]


def read() -> list[Row]:
    rows: list[Row] = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    return rows


def on_screen(title: str, measure: str, rows: Sequence[Row]) -> Table:
    """By growing bits, the best last."""
    table = Table("bits", "method", "bytes", measure, "gap", "closed", title=title)
    plain = _plain(rows)
    for row in sorted(rows, key=lambda row: (row["bits"], -row["gap"])):
        table.add_row(
            f"{row['bits']:.1f}", row["method"], f"{row['bytes']:,}", _short(row["value"]),
            f"{row['gap']:.4f}", _closed(row, plain),
        )  # fmt: skip
    return table


def markdown(measure: str, rows: Sequence[Row]) -> str:
    """As it stands in docs/benchmarks.md: a line for each method, a column for each size."""
    sizes = sorted({row["bits"] for row in rows})
    plain = _plain(rows)
    found = [[f"{measure} at bits a number", *(f"{bits:.1f}" for bits in sizes)]]
    found.append(["---"] * len(found[0]))
    for method, some in _by_method(rows).items():
        own = {row["bits"]: row for row in some}
        cells = [
            f"{_short(own[bits]['value'])} {_closed(own[bits], plain)}".strip()
            if bits in own else "" for bits in sizes
        ]  # fmt: skip
        found.append([_label(method), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in found)


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Ours first."""
    names = sorted({row["method"] for row in rows})
    names.sort(key=lambda name: [*METHODS, name].index(name))
    return {name: [row for row in rows if row["method"] == name] for name in names}


def _label(method: str) -> str:
    return method if method in METHODS else f"mlx-lm's {method}"


def _plain(rows: Sequence[Row]) -> dict[float, float]:
    """The gap of plain rounding by bits."""
    return {row["bits"]: row["gap"] for row in rows if row["method"] == "plain"}


def _closed(row: Row, plain: dict[float, float]) -> str:
    """The share of plain rounding's gap that is closed, if any."""
    share = 1 - row["gap"] / plain[row["bits"]] if row["bits"] in plain else 0
    return f"({share:.0%})" if share > 0 else ""


def _short(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.1e}"


def draw(rows: Sequence[Row]) -> Path:
    """Gaps by bytes, a curve for each method that has several.

    Needs matplotlib: `pip install 'qgraph[bench]'`.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "qgraph"  # the same file for the same rows
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.subplots()
    for method, some in _by_method(rows).items():
        points = sorted({(row["bytes"] / 1e6, row["gap"]) for row in some})
        style = "o-" if method in METHODS else "s:"
        axes.plot(*zip(*points, strict=True), style, ms=4, lw=1.2, label=_label(method))
    axes.set(
        yscale="log", xlabel="packed weights, MB", ylabel="nats a token more than with floats",
        title="SmolLM2-135M: quality by bytes",
    )  # fmt: skip
    half = math.log(2)
    axes.axhline(half, color="0.8", lw=0.8, zorder=0)
    axes.annotate("perplexity doubled", (0.99, half), xycoords=("axes fraction", "data"),
                  ha="right", va="bottom", color="0.5", fontsize=8)  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None})
    return PICTURE
