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

from qgraph.ir import Graph, Node, Value
from qgraph.ledger import Entry, record
from qgraph.rewrite import rewrite
from qgraph.target import Target, as_target
from qgraph.tensor import Tensor, apply

_NAME = "widen-half"
_HALF = (mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class WidenHalf:
    """See the module."""

    target: Target | None = None
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        if not (self.target or as_target()).is_cpu:
            return graph
        return rewrite(graph, lambda _: _widen, self.name)


def _widen(node: Node) -> Sequence[Value] | None:
    if node.op not in ("quantized_matmul", "gather_qmm") or node.output.dtype not in _HALF:
        return None
    args = {
        name: _wide(arg) if name in ("x", "scales", "biases") and isinstance(arg, Value) else arg
        for name, arg in node.args.items()
    }
    types = [type(node.output.type)(node.output.shape, mx.float32)]
    product = node.replace(args=args, types=types)
    record(Entry(_NAME, "chosen", f"{node.op} of {node.inputs[0].type}", node.origin, "in float32"))
    return [apply("astype", (Tensor(product.output), node.output.dtype)).value]


def _wide(value: Value) -> Value:
    if value.dtype not in _HALF:
        return value
    result: Tensor = apply("astype", (Tensor(value), mx.float32))
    return result.value
