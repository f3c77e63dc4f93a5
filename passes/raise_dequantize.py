"""Recognize the many primitives into which MLX expands `dequantize` on CPUs as the one op again.

Rewrites:
    10. the expansion of an affine or mxfp4 `dequantize` of a packed weight, which an import on a
        CPU gives as 20 to 40 primitives, exactly: the pattern is MLX's own expansion for the same
        shapes, recorded as the graph itself was.  In loops too, where what it looks up is an
        operand of the loop.
Leaves alone:
    1. anything that differs from it in one op, setting or constant.
    2. mxfp8 and nvfp4: MLX 0.32 exports no graph with their expansion ("Unable to get state for
       primitive FromFP8"); an import carries them through as the op itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qgraph.importer.expansions import expansion
from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.loops import constants_behind
from qgraph.ir.ops import OPS
from qgraph.quantization.modes import MODES
from qgraph.types import TensorType

from .shared.raising import Expansion, matches, raise_expansions

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
_LARGEST = 64
"""Nodes that an expansion may have; how far to look for its end."""

_EXPORTED = ("affine", "mxfp4")

Settings = dict[str, Any]


@dataclass(frozen=True)
class RaiseDequantize:
    """See the module."""

    name: str = "raise-dequantize"
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        known = constants_behind(graph)
        return raise_expansions(graph, lambda inner: _find(inner, known), self.name, case=10)


def _find(graph: Graph, known: Mapping[Value, Value]) -> Iterator[Expansion]:
    packed = [v for v in graph.users if v.dtype == mx.uint32 and v.ndim >= 2]
    for w in packed:
        near = _downstream(graph, w)
        for settings in _formats(w):
            shape = (*w.shape[:-1], w.shape[-1] * 32 // settings["bits"])
            for node in near:
                if node.outputs[0].shape == shape and node.output.dtype in _FLOATS:
                    found = _expansion(node, w, settings, known)
                    if found is not None:
                        yield found


def _formats(w: Value) -> Iterator[Settings]:
    for mode in map(MODES.__getitem__, _EXPORTED):
        for bits in mode.bits:
            for group in mode.group_sizes:
                if w.shape[-1] * 32 % bits == 0 and (w.shape[-1] * 32 // bits) % group == 0:
                    yield {"group_size": group, "bits": bits, "mode": mode.name}


def _downstream(graph: Graph, value: Value) -> list[Node]:
    """Nodes that depend on `value`, nearest first, no more than an expansion may have.

    What takes packed weights, such as `dequantize` itself, stands in no expansion.
    """
    found: dict[Node, None] = {}
    pending = [value]
    while pending and len(found) < _LARGEST:
        for node in graph.users.get(pending.pop(0), ()):
            if node not in found and not node.bodies and OPS[node.op].kind != "quantization":
                found[node] = None
                pending.extend(node.outputs)
    return list(found)


def _expansion(
    node: Node, w: Value, settings: Settings, known: Mapping[Value, Value]
) -> Expansion | None:
    """`node` as the end of an expansion for `w`, with the other parts of the weight."""
    affine = settings["mode"] == "affine"
    shape = (*w.shape[:-1], node.output.shape[-1] // settings["group_size"])
    types = [
        ("w", w.type),
        ("scales", TensorType(shape, node.output.dtype if affine else mx.uint8)),
    ]
    if affine:
        types.append(("biases", types[1][1]))
    else:
        settings = {**settings, "dtype": node.output.dtype}
    pattern = expansion("dequantize", tuple(types), tuple(settings.items()))
    if pattern is None or pattern.outputs[0].node.op != node.op:
        return None
    bound = {pattern.inputs[0]: w}
    if not matches(pattern.outputs[0], node.output, bound, known):
        return None
    operands = {name: bound[v] for (name, _), v in zip(types, pattern.inputs, strict=True)}
    return Expansion(node.output, "dequantize", operands, settings)
