"""Round what quantized weights are multiplied by to 8 bits, as `Quantize(activations=8)` asks.

It changes numbers: each row is rounded in groups of 32 to the nearest of 256 steps between its
smallest and largest.  The graph shows it as what it is, `dequantize(quantize(x))`, so that all
targets, and the body of a region, compute the same.  A processor that multiplies bytes does such a
product two to three times as fast as one in float32.

Rewrites:
    1. x of a `quantized_matmul` of at least 8 rows in float32 by one affine weight of 4 or 8 bits,
       groups along the sum.  Products of one x share what is rounded.
    2. the same in half precision: rows and product are in float32, the result is cast down.
Leaves alone:
    1. fewer rows: reading the weight is what takes the time of those.
    2. other formats, weights in batches and those of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.ops import setting
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import Visit, rewrite
from qgraph.tracing.tensor import Tensor, apply

from .shared.casts import cast, in_float32

_NAME = "round-activations"
GROUP = 32
FEWEST_ROWS = 8


@dataclass(frozen=True)
class RoundActivations:
    """See the module."""

    name: str = _NAME
    contract: str = "tolerance 1e-1"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, _visitor, self.name)


def _visitor(_: Graph) -> Visit:
    rounded: dict[Value, Value] = {}

    def visit(node: Node, _: Node) -> Sequence[Value] | None:
        if node.op != "quantized_matmul":
            return None
        reason = _refusal(node)
        if reason is not None:
            record(Entry.of(node, _NAME, "refused", f"not rounded: {reason}"))
            return None
        x = node.operand("x")
        if x not in rounded:
            rounded[x] = _rounded(cast(Tensor(x), mx.float32)).value
        record(Entry.of(node, _NAME, "rewritten", "", 1 if x.dtype == mx.float32 else 2))
        made = node.replace(args={**node.args, "x": rounded[x]})
        if x.dtype == mx.float32:
            return made.outputs
        return [in_float32(made, ("scales", "biases"))]

    return visit


def _rounded(x: Tensor) -> Tensor:
    parts = apply("quantize", (x, GROUP, 8))
    found: Tensor = apply("dequantize", (*parts, GROUP, 8))
    return found


def _refusal(node: Node) -> str | None:
    x, w = node.operand("x"), node.operand("w")
    rows = x.type.size // max(1, x.shape[-1])
    if setting(node, "mode") != "affine" or setting(node, "bits") not in (4, 8):
        return "the weight is not affine of 4 or 8 bits"
    if w.ndim != 2 or x.ndim < 2 or not setting(node, "transpose"):
        return "the weight is a batch, or its groups do not run along the sum"
    if rows < FEWEST_ROWS:
        return f"{rows} rows, which take the time in which the weight is read"
    return None
