"""Recognize the primitives into which MLX expands `fast.layer_norm` on CPUs as the one op again.

Rewrites, exactly on CPUs, within 2e-2 on GPUs, where MLX has a kernel:
    1. a norm with weight and bias, with either, or with neither, computed in float32 whatever the
       dtypes of x and weight.
    2. one normalized tensor read by several weights: a norm each.
Leaves alone:
    1. anything that differs from MLX's expansion in one op, setting or constant: a norm over
       another axis, or a variance by another formula such as `mx.var`.
    2. a normalized tensor that is also read without weight or bias: a norm without, and the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qgraph.ir.graph import Graph

from .shared.norms import largest, scaled
from .shared.raising import Expansion, Raising, number, peel

PARTS = (("multiply", "weight"), ("add", "bias"))


@dataclass(frozen=True)
class RaiseLayerNorm(Raising):
    """See the module."""

    name: str = "raise-layer-norm"

    def find(self, graph: Graph) -> Iterator[Expansion]:
        for node in graph.nodes:
            if node.op != "rsqrt" or node.inputs[0].node.op != "add":
                continue
            variance, eps = node.inputs[0].node.inputs
            centred = peel(variance, "multiply", "sum", "square")
            small = number(eps)
            if centred.node.op != "subtract" or small is None:
                continue
            x = centred.node.inputs[0]
            for end in scaled(graph, centred, node.output):
                yield from largest(graph, "fast.layer_norm", x, small, end, PARTS)
