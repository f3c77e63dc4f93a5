"""Compute, while compiling, what depends on small constants alone.

Folds:
    1. an op whose tensors are all constants, inputs and results within `max_bytes`.
    2. an op without tensors (`arange`, `full`) within `max_bytes`.
Leaves alone:
    1. anything larger: zeros of a key-value cache would only take memory.
    2. quantize and dequantize: `hoist-quantize` moves them, where the report shows them.
    3. random ops, `keep`, loops and branches, and what differs from rank to rank of a mesh.
    4. broadcasts of constants: what reads them broadcasts by itself, and a number stays one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value, constant_value, is_constant, map_values
from qgraph.ir.ops import OPS, RANDOM
from qgraph.rewrite.rewriter import rewrite_each

_KEPT = RANDOM | {"quantize", "dequantize", "keep", "quantized_matmul", "gather_qmm", "pack_weight",
                  "broadcast_to"}  # fmt: skip
_OF_RANKS = frozenset({"collective", "placement"})


@dataclass(frozen=True)
class FoldConstants:
    """See the module.  `max_bytes` bounds inputs and results of one op, each in sum."""

    max_bytes: int = 1 << 16
    name: str = "fold-constants"
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite_each(graph, self._fold, self.name)

    def _fold(self, node: Node) -> Sequence[Value] | None:
        if node.op in _KEPT or node.op not in OPS or node.stream is not None:
            return None
        if OPS[node.op].kind in _OF_RANKS:
            return None
        if not all(is_constant(v) and not v.node.args["data"].is_released for v in node.inputs):
            return None
        sizes = [sum(v.type.nbytes for v in values) for values in (node.inputs, node.outputs)]
        if max(sizes) > self.max_bytes:
            return None
        args = {
            name: map_values(arg, lambda v: v.node.args["data"].array)
            for name, arg in node.args.items()
        }
        result = OPS[node.op].call(args)
        arrays = [result] if isinstance(result, mx.array) else list(result)
        mx.eval(arrays)
        name = next((name for v in node.inputs if (name := v.node.args["name"])), "")
        return [constant_value(array, f"{name}_{node.op}" if name else "") for array in arrays]
