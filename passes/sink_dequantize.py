"""Take rows of a packed weight before they are dequantized, not after.

Rewrites (each exact: a row's groups lie within the row):
    6. `take(dequantize(q), ids)` and `dequantize(q)[ids]`, as embeddings do: only the rows asked
       for are dequantized.
    8. slices and splits along rows, and concatenations of rows with the same settings.
Leaves alone:
    1. an index or a slice on the last axis, along which groups run.
    2. a lookup of more rows than the weight has: dequantizing once is less work.
    3. slices of a weight that something else needs dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qgraph.ir import Graph, Node, Value
from qgraph.ledger import Decision, Entry, record, weight_name
from qgraph.rewrite import Visit, rewrite, setting
from qgraph.tensor import Tensor, apply

from .weight_view import PARTS, parts_of

_NAME = "sink-dequantize"


@dataclass(frozen=True)
class SinkDequantize:
    """See the module."""

    name: str = _NAME
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, _visitor, self.name)


def _visitor(graph: Graph) -> Visit:
    shared = {
        node.serial
        for node in graph.nodes
        if node.op == "dequantize"
        and len(graph.users.get(node.output, ())) + (node.output in graph.outputs) > 1
    }

    def visit(node: Node) -> Sequence[Value] | None:
        if node.op == "concatenate":
            return _concatenate(node)
        rule = _RULES.get(node.op)
        if rule is None or not node.inputs or node.inputs[0].node.op != "dequantize":
            return None
        source = node.inputs[0].node
        result = rule(node, source, source.serial in shared)
        if isinstance(result, str):
            _note(node, source, "refused", f"not fused: {result}")
            return None
        _note(node, source, "fused", "", 6 if _is_lookup(node) else 8)
        return result

    return visit


def _is_lookup(node: Node) -> bool:
    """Are rows picked by indices that only the run knows?"""
    return node.op == "take" or len(node.inputs) > 1


def _dequantized(source: Node, parts: Sequence[Tensor]) -> Value:
    options = {k: a for k, a in source.args.items() if k not in PARTS}
    result: Tensor = apply("dequantize", tuple(parts), options, source.stream)
    return result.value


def _each(source: Node, fn: Callable[[Tensor], Tensor]) -> list[Value]:
    return [_dequantized(source, [fn(part) for part in parts_of(source)])]


_LAST = "groups run along the last axis; index rows, or quantize the transpose"


def _take(node: Node, source: Node, shared: bool) -> list[Value] | str:
    axis, weight = setting(node, "axis"), node.operand("a")
    indices = node.args["indices"]
    if axis is None or axis % weight.ndim == weight.ndim - 1:
        return _LAST
    axis %= weight.ndim
    if isinstance(indices, Value):
        if indices.type.size > weight.shape[axis]:
            return (
                f"{indices.type.size} rows are looked up in {weight.shape[axis]}; "
                "dequantizing all of them once is less work"
            )
        indices = Tensor(indices)
    return _rows(node, source, indices, axis)


def _rows(node: Node, source: Node, indices: Any, axis: int) -> list[Value]:
    """The rows, dequantized; one row alone has one axis, and dequantize takes two."""
    if node.output.ndim > 1:
        return _each(source, lambda part: apply("take", (part, indices, axis)))
    one = mx.array([indices]) if isinstance(indices, int) else indices.reshape(1)
    (row,) = _each(source, lambda part: apply("take", (part, one, axis)))
    return [apply("reshape", (Tensor(row), node.output.shape)).value]


def _getitem(node: Node, source: Node, shared: bool) -> list[Value] | str:
    index = node.args["index"]
    parts = index if isinstance(index, tuple) else (index,)
    weight = node.operand("a")
    if any(p is Ellipsis or p is None for p in parts) or len(parts) >= weight.ndim:
        return _LAST if len(parts) >= weight.ndim else "index rows without ... and None"
    lookups = [p for p in parts if isinstance(p, Value)]
    if not lookups and shared:
        return "the whole weight is needed dense by something else as well"
    if node.output.type.size > weight.type.size:
        return "more rows are looked up than there are; dequantizing once is less work"
    if node.output.ndim < 2:
        if weight.ndim != 2:
            return "one row of several axes is looked up; index one axis after the other"
        return _rows(node, source, Tensor(lookups[0]) if lookups else parts[0], 0)
    place = tuple(Tensor(p) if isinstance(p, Value) else p for p in parts)
    return _each(source, lambda part: apply("getitem", (part, place)))


def _split(node: Node, source: Node, shared: bool) -> list[Value] | str:
    weight, axis = node.operand("a"), setting(node, "axis")
    if axis % weight.ndim == weight.ndim - 1:
        return _LAST
    if shared:
        return "the whole weight is needed dense by something else as well"
    sections = node.args["indices_or_sections"]
    pieces = [apply("split", (part, sections, axis)) for part in parts_of(source)]
    return [_dequantized(source, piece) for piece in zip(*pieces, strict=True)]


_RULES: dict[str, Callable[[Node, Node, bool], list[Value] | str]] = {
    "take": _take,
    "getitem": _getitem,
    "split": _split,
}


def _concatenate(node: Node) -> Sequence[Value] | None:
    sources = [v.node for v in node.inputs]
    if any(s.op != "dequantize" for s in sources) or len(sources) < 2:
        return None
    first, axis = sources[0], setting(node, "axis")
    options = [{k: a for k, a in s.args.items() if k not in PARTS} for s in sources]
    dtypes = {str(v.dtype) for s in sources for v in s.inputs[1:]}
    if any(o != options[0] for o in options) or len(dtypes) > 1:
        _note(node, first, "refused", "not fused: the weights are quantized differently")
        return None
    if axis is None or axis % node.output.ndim == node.output.ndim - 1:
        _note(node, first, "refused", f"not fused: {_LAST}")
        return None
    columns = zip(*(parts_of(s) for s in sources), strict=True)
    joined = [apply("concatenate", (list(column), axis)) for column in columns]
    _note(node, first, "fused", "", 8)
    return [_dequantized(first, joined)]


def _note(node: Node, source: Node, decision: Decision, reason: str, case: int = 0) -> None:
    name = weight_name(source.operand("w"))
    what = f"{node.op} of {source.output.type}"
    record(Entry(_NAME, decision, what, node.origin, reason, case, name))
