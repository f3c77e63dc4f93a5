"""Recognize the many primitives into which MLX expands `dequantize` on CPUs as the one op again.

Rewrites:
    10. the expansion of an affine `dequantize` of a packed weight, which an import on a CPU gives
        as some 40 primitives, exactly: the pattern is MLX's own expansion for the same shapes,
        recorded as the graph itself was.
Leaves alone:
    1. anything that differs from it in one op, setting or constant.
    2. the modes other than affine, whose expansion MLX does not hand over (it uses FP8 conversion).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from qgraph.importer import from_mlx
from qgraph.ir import Graph, Node, Value
from qgraph.ledger import Entry, record
from qgraph.quantization import MODES
from qgraph.rewrite import Visit, rewrite
from qgraph.tensor import Tensor, apply
from qgraph.types import Spec, TensorType

_NAME = "raise-dequantize"
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
_LARGEST = 64
"""Nodes that an expansion may have; how far to look for its end."""

Bindings = dict[Value, Value]


@dataclass(frozen=True)
class RaiseDequantize:
    """See the module."""

    name: str = _NAME
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, _visitor, self.name)


def _visitor(graph: Graph) -> Visit:
    found = {root.serial: match for root, match in _expansions(graph)}
    places = iter(graph.nodes)
    now: dict[Value, Value] = {}

    def visit(node: Node) -> Sequence[Value] | None:
        old = next(places)
        now.update(zip(old.outputs, node.outputs, strict=True))
        if old.serial not in found:
            return None
        values, settings = found[old.serial]
        parts = tuple(Tensor(now.get(v, v)) for v in values)
        result = apply("dequantize", parts, settings)
        name = str(values[0].node.args.get("name", ""))
        what = f"dequantize of {values[0].type}"
        record(
            Entry(_NAME, "rewritten", what, old.origin, "its primitives are one again", 10, name)
        )
        now[old.output] = result.value
        return [result.value]

    return visit


def _expansions(graph: Graph) -> Iterator[tuple[Node, tuple[tuple[Value, ...], dict[str, Any]]]]:
    """The last node of each expansion, with the packed parts and the settings."""
    packed = [v for v in graph.users if v.dtype == mx.uint32 and v.ndim >= 2]
    for w in packed:
        near = _downstream(graph, w)
        for bits, group in _formats(w):
            shape = (*w.shape[:-1], w.shape[-1] * 32 // bits)
            for node in near:
                if node.outputs[0].shape != shape or node.output.dtype not in _FLOATS:
                    continue
                parts = _match_expansion(node, w, bits, group)
                if parts is not None:
                    yield node, (parts, {"group_size": group, "bits": bits, "mode": "affine"})


def _formats(w: Value) -> Iterator[tuple[int, int]]:
    mode = MODES["affine"]
    for bits in mode.bits:
        for group in mode.group_sizes:
            if w.shape[-1] * 32 % bits == 0 and (w.shape[-1] * 32 // bits) % group == 0:
                yield bits, group


def _downstream(graph: Graph, value: Value) -> list[Node]:
    """Nodes that depend on `value`, nearest first, no more than an expansion may have."""
    found: dict[Node, None] = {}
    pending = [value]
    while pending and len(found) < _LARGEST:
        for node in graph.users.get(pending.pop(0), ()):
            if node not in found and not node.bodies:
                found[node] = None
                pending.extend(node.outputs)
    return list(found)


def _match_expansion(node: Node, w: Value, bits: int, group: int) -> tuple[Value, ...] | None:
    pattern = _pattern(w.type, node.output.dtype, bits, group)
    if pattern.outputs[0].node.op != node.op:
        return None
    bound: Bindings = {}
    if not _matches(pattern.outputs[0], node.output, bound):
        return None
    parts = tuple(bound[v] for v in pattern.inputs)
    return parts if parts[0] is w else None


@lru_cache(maxsize=512)
def _pattern(w: TensorType, dtype: mx.Dtype, bits: int, group: int) -> Graph:
    """MLX's expansion of `dequantize` for a packed type, as an import records it."""
    columns = w.shape[-1] * 32 // bits
    scales = TensorType((*w.shape[:-1], columns // group), dtype)

    def dequantize(w: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.dequantize(w, scales, biases, group, bits)

    return from_mlx(dequantize, Spec(w), Spec(scales), Spec(scales))


def _matches(pattern: Value, value: Value, bound: Bindings) -> bool:
    """Is `value` computed as `pattern` is?  Binds the pattern's inputs."""
    pending = [(pattern, value)]
    while pending:
        p, v = pending.pop()
        if p in bound:
            if bound[p] is not v:
                return False
            continue
        if p.type != v.type:
            return False
        bound[p] = v
        if p.node.op == "input":
            continue
        if (
            p.index != v.index
            or p.node.op != v.node.op
            or p.node.attrs.keys() != v.node.attrs.keys()
        ):
            return False
        if p.node.op == "constant":
            if not mx.array_equal(p.node.args["data"].array, v.node.args["data"].array):
                return False
            continue
        if p.node.attrs != v.node.attrs or len(p.node.inputs) != len(v.node.inputs):
            return False
        pending.extend(zip(p.node.inputs, v.node.inputs, strict=True))
    return True
