"""The rows that are kept, as a table on the screen, as one in Markdown, and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.machine import RESULTS

FILE = RESULTS / "quality.json"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "quality.svg"

Row = dict[str, Any]


def kept(model: str, tokens: int) -> list[Row]:
    """The rows of a model, fitted on so many tokens."""
    return [row for row in read() if row["model"] == model and row["tokens"] == tokens]


def read() -> list[Row]:
    rows: list[Row] = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    return rows


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """By growing bits, the best last: bits, method, bytes, value, gap, and the share of plain
    rounding's gap that is closed."""
    plain = {row["bits"]: row["gap"] for row in rows if row["method"] == "plain"}
    found = []
    for row in sorted(rows, key=lambda row: (row["bits"], -row["gap"])):
        closed = 1 - row["gap"] / plain[row["bits"]] if row["bits"] in plain else None
        value = row["value"]
        found.append([
            f"{row['bits']:.1f}", row["method"], f"{row['bytes']:,}",
            f"{value:.4g}" if value < 1000 else f"{value:,.0f}",
            f"{row['gap']:.4f}", "" if closed is None or closed <= 0 else f"{closed:.0%}",
        ])  # fmt: skip
    return found


def on_screen(title: str, measure: str, rows: Sequence[Row]) -> Table:
    table = Table("bits", "method", "bytes", measure, "gap", "closed", title=title)
    for line in lines(rows):
        table.add_row(*line)
    return table


def markdown(measure: str, rows: Sequence[Row]) -> str:
    """As it stands in docs/benchmarks.md."""
    head = ["bits a number", "method", "bytes", measure, "gap", "closed"]
    body = [head, ["---"] * len(head), *lines(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def draw(rows: Sequence[Row]) -> Path:
    """Gaps by bytes, a curve for each method that has several.

    Needs matplotlib: `pip install 'qgraph[bench]'`.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "qgraph"  # the same file for the same rows
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.subplots()
    theirs = ("dynamic_quant", "GPTQ", "AWQ")
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted({(r["bytes"] / 1e6, r["gap"]) for r in rows if r["method"] == method})
        label = f"mlx-lm's {method}" if method in theirs else method
        style = "s:" if method in theirs else "o-"
        axes.plot(*zip(*points, strict=True), style, ms=4, lw=1.2, label=label)
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
