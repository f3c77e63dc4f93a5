"""AWQ's factors: columns whose inputs are large are multiplied before they are quantized.

As in Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv:2306.00978): the factors of
channels are a power of the size of their activations, and the power is searched. What a factor
would do to the products is told by the Hessian of their inputs, so that nothing is run for it. That
factors may be taken out again before the products is proven by `passes/shared/channels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..ir.graph import Graph
from ..passes.shared.channels import Channels, Refused, follow
from .prices import weighs
from .rounding.formats import Format
from .rounding.hessians import damped
from .rounding.rounded import nearest
from .statistics.gathered import Array

_POWERS = np.arange(1, 20) / 20
_ROWS = 96
"""Rows of each weight on which factors are tried."""


@dataclass
class Scaling:
    """Channels of a weight, and the weights whose columns they end at.

    Attributes:
        source: the weight that is divided.
        ends: which channel each column is of, by name of the weight that is multiplied.
        factors: those that were found; None where all ones are best.
        searched: were they searched?
    """

    source: str
    count: int
    ends: dict[str, Array]
    factors: Array | None = None
    searched: bool = False


def scalings(graph: Graph, weights: Sequence[str]) -> list[Scaling]:
    """All that the graph allows, of which some end is among `weights`."""
    found = []
    for node in graph.constants():
        value = node.output
        if not node.args["name"] or not mx.issubdtype(value.dtype, mx.floating):
            continue
        try:
            channels: Channels = follow(graph, value)
        except Refused:
            continue
        ends = {str(v.node.args["name"]): ids for v, ids in channels.multiplied.items()}
        if not set(ends).isdisjoint(weights):
            found.append(Scaling(str(node.args["name"]), channels.count, ends))
    return found


def search(
    scaling: Scaling, ends: Mapping[str, tuple[Array, Array]], h: Array, form: Format,
    dtype: mx.Dtype, methods: Sequence[str],
) -> None:  # fmt: skip
    """Find the factors under which the products are nearest to what they were.

    Args:
        ends: the weights at the ends that are to be quantized, (rows, columns), and what an error
            in each of their rows costs.
        h: the Hessian of the inputs that they share.
        form: to try factors in.
    """
    scaling.searched = True
    some = {n: [part[:: max(1, len(w) // _ROWS)] for part in (w, g)] for n, (w, g) in ends.items()}
    h = damped(h)
    columns = weighs(h, methods)

    def cost(factors: Array | None, searched: bool) -> float:
        total = 0.0
        for name, (w, gains) in some.items():
            by = np.ones(w.shape[1]) if factors is None else factors[scaling.ends[name]]
            by = by.astype(np.float32)
            rounded = nearest(w * by, form, dtype, columns / by**2 if searched else None)
            away = rounded.values() / by - w
            each = (away**2) @ columns if "gptq" in methods else ((away @ h) * away).sum(1)
            total += float((gains * each).sum()) * len(ends[name][0]) / len(w)
        return total

    ids = scaling.ends[next(iter(some))]
    sums = np.bincount(ids, np.sqrt(np.diag(h)), scaling.count)
    means = sums / np.maximum(np.bincount(ids, None, scaling.count), 1)
    best = min((_factors(means, power) for power in _POWERS), key=lambda by: cost(by, False))
    scales = "scales" in methods
    scaling.factors = best if cost(best, scales) < cost(None, scales) else None


def _factors(means: Array, power: float) -> Array:
    factors = np.maximum(means, 1e-6) ** power
    factors = factors / np.sqrt(factors.max() * factors.min())
    # What float16 holds well, even if a weight is divided by them.
    return np.asarray(np.clip(factors, 1e-2, 1e2), np.float32)
