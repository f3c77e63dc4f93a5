"""What a fit did to a model: weight by weight, and quality by bytes as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..fitting.budget import cheapest
from .quantize import Packed

_POINTS = 40


def report(packed: Packed) -> str:
    """A page in Markdown: perplexity, bytes, and a row for each weight, the costliest first."""
    weights = packed.weights
    size = sum(one.nbytes for one in weights.values())
    count = sum(math.prod(one.shape) for one in weights.values())
    lines = [
        "# How this model was packed",
        "",
        f"{len(weights)} weights, {size:,} bytes, {8 * size / max(count, 1):.3f} bits a number, "
        "scales and biases included. Perplexity on text that was not fitted on: "
        f"{packed.before:.3f} as it was, {packed.after:.3f} as it is.",
        "",
        "| weight | shape | mode | bits | group | bytes | error of its products | nats a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in sorted(weights.items(), key=lambda item: -(item[1].sensitivity or 0.0)):
        cost = "" if one.sensitivity is None else f"{one.sensitivity:.2e}"
        shape = "×".join(map(str, one.shape))
        lines.append(
            f"| {name} | {shape} | {one.mode} | {one.bits} | {one.group_size} | {one.nbytes:,} "
            f"| {one.error:.2%} | {cost} |"
        )
    return "\n".join(lines) + "\n"


def curve(packed: Packed) -> list[tuple[int, float]]:
    """The least cost at the result, in nats a token, for growing bytes; empty if none was asked."""
    prices = [one.prices for one in packed.weights.values() if one.prices]
    if not prices:
        return []
    sizes = [[size for size, _ in each] for each in prices]
    costs = [[cost for _, cost in each] for each in prices]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    points: list[tuple[int, float]] = []
    for i in range(_POINTS + 1):
        budget = least + (most - least) * i // _POINTS
        picked = cheapest(sizes, costs, budget)
        if picked is not None:
            size = sum(each[p] for each, p in zip(sizes, picked, strict=True))
            cost = sum(each[p] for each, p in zip(costs, picked, strict=True))
            if not points or size > points[-1][0]:
                points.append((size, cost))
    return points


def draw(packed: Packed, path: Path) -> Path | None:
    """The curve as a picture, with what was chosen on it; None without matplotlib or a curve.

    Needs matplotlib: `pip install 'qgraph[bench]'`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    points = curve(packed)
    if not points:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Any = figure.subplots()
    axes.plot([size / 1e6 for size, _ in points], [cost for _, cost in points])
    weights = packed.weights.values()
    size, cost = sum(w.nbytes for w in weights), sum(w.sensitivity or 0.0 for w in weights)
    measured = math.log(packed.after / packed.before)
    axes.plot([size / 1e6], [cost], "o", label="chosen, as expected")
    axes.plot([size / 1e6], [measured], "x", label="chosen, as measured")
    axes.set(xlabel="packed weights, MB", ylabel="nats a token more than with floats", yscale="log")
    axes.legend()
    figure.savefig(path)
    return path
