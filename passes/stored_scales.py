"""Products in float32 read their scales as they are stored.

MLX takes scales of another dtype than that of x and casts them, so writing the cast out is a choice
of whoever wrote the model.  The engine of regions widens scales as it reads them, in fewer bytes.

Rewrites, exactly:
    1. `quantized_matmul` of float32 whose scales and biases are casts up from half precision.
Leaves alone:
    1. products of half precision: their sums would be of another dtype.
    2. other targets, and machines on which the engine cannot be built: there casts are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value
from qgraph.kernels.base import HALF
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.runtime.regions.cpu.known import why_no_engine
from qgraph.target import Target, as_target


def forms_regions(target: Target | None) -> bool:
    """Is there an engine of regions for a target, on this machine?"""
    return as_target(target).is_cpu and why_no_engine() is None


@dataclass(frozen=True)
class StoredScales:
    """See the module."""

    target: Target | None = None
    name: str = "stored-scales"
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        if not forms_regions(self.target):
            return graph
        return rewrite_each(graph, as_stored, self.name, ("quantized_matmul",))


def as_stored(node: Node) -> Sequence[Value] | None:
    """A product over the scales before their casts, or None where there are none."""
    if node.op != "quantized_matmul" or node.operand("x").dtype != mx.float32:
        return None
    args = dict(node.args)
    for name in ("scales", "biases"):
        value = node.value(name)
        if value is None:
            continue
        source = value.node.inputs[0] if value.node.op == "astype" else None
        if source is None or source.dtype not in HALF:
            return None
        args[name] = source
    return node.replace(args=args).outputs
