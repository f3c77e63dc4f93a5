"""On CPUs, quantized products of half precision run in float32.

MLX's CPU kernel accumulates in the dtype of x.  In bfloat16 and float16 it is 8 to 40 times slower
than in float32, and its error is some 10 times that of dequantize and matmul.  In float32 the error
is that of rounding x and the result alone.

Rewrites:
    1. `quantized_matmul` and `gather_qmm` with x of half precision: x and affine scales are cast
       up, the result down.  The casts of scales are packed, by `hoist-quantize`.
Leaves alone:
    1. float32.
    2. targets other than CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.target import Target, as_target

from .shared.casts import in_float32
from .shared.products import QUANTIZED

_NAME = "widen-half"
_HALF = (mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class WidenHalf:
    """See the module."""

    target: Target | None = None
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        if not as_target(self.target).is_cpu:
            return graph
        return rewrite_each(graph, _widen, self.name, QUANTIZED)


def _widen(node: Node) -> Sequence[Value] | None:
    if node.output.dtype not in _HALF:
        return None
    record(Entry.of(node, _NAME, "chosen", "in float32"))
    return [in_float32(node, ("x", "scales", "biases"))]
