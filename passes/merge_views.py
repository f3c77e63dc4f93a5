"""Chains of views that keep all elements in order become one.

A view computes nothing, but MLX makes an array of each: about a microsecond, which decoding on a
GPU waits for.

Rewrites, exactly:
    1. a view of a view (`reshape`, `squeeze`, `expand_dims`, a `transpose` that moves axes of one
       element only, ...) becomes one `reshape`.
    2. where that has the shape they began with, nothing.
Leaves alone:
    1. views that move elements or leave some out, nodes with a stream of their own, and those of
       the pack and prepare steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.ir.graph import Graph, Node, Value
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.tracing.tensor import Tensor, apply

from .shared.views import is_plain, without_views


@dataclass(frozen=True)
class MergeViews:
    """See the module."""

    name: str = "merge-views"
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite_each(graph, _visit, self.name)


def _visit(node: Node) -> Sequence[Value] | None:
    if not is_plain(node):
        return None
    source, shape = without_views(node.output), node.output.shape
    if source.shape == shape:
        return [source]
    if source is node.inputs[0]:
        return None
    return [apply("reshape", (Tensor(source), shape)).value]
