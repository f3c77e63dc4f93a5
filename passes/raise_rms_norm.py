"""Recognize the primitives into which MLX expands `fast.rms_norm` on CPUs as the one op again.

Rewrites, exactly on CPUs, within 2e-2 on GPUs, where MLX has a kernel:
    1. a norm with a weight, computed in float32 whatever the dtypes of x and weight.
    2. a norm without one.
    3. one normalized tensor read by several weights: a norm each.
Leaves alone:
    1. anything that differs from MLX's expansion in one op, setting or constant: a norm over
       another axis, one computed in half precision, or with eps outside of the root.
    2. what a model does to weight or result: `1 + weight` is the weight, and a factor beside a norm
       without weight stays a product.
    3. a normalized tensor that is also read without the weight: a norm without one, and a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qgraph.ir.graph import Graph

from .shared.norms import largest, scaled
from .shared.raising import Expansion, Raising, number, peel

PARTS = (("multiply", "weight"),)


@dataclass(frozen=True)
class RaiseRmsNorm(Raising):
    """See the module."""

    name: str = "raise-rms-norm"

    def find(self, graph: Graph) -> Iterator[Expansion]:
        for node in graph.nodes:
            if node.op != "rsqrt" or node.inputs[0].node.op != "add":
                continue
            mean, eps = node.inputs[0].node.inputs
            square = peel(mean, "multiply", "sum").node
            small = number(eps)
            if square.op != "square" or small is None:
                continue
            x = square.inputs[0]
            for end in scaled(graph, x, node.output):
                yield from largest(graph, "fast.rms_norm", x, small, end, PARTS)
