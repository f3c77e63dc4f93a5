"""Take rows of a packed weight before they are dequantized, not after.

Rewrites (each exact: a row's groups lie within the row), also of the weight transposed:
    6. `take(dequantize(q), ids)` and `dequantize(q)[ids]`, as embeddings do: only the rows asked
       for are dequantized.
    8. slices and splits along rows, and concatenations of rows with the same settings.
And takes a `dequantize` into the loops and branches whose products read it, see `enter_loops`.
Leaves alone:
    1. an index or a slice on the last axis, along which groups run.
    2. a lookup of more rows than the weight has: dequantizing once is less work.
    3. slices of a weight that something else needs dense; other slices and products do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qgraph.analysis.changes import readers
from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.kinds import PRODUCTS
from qgraph.ir.ops import setting
from qgraph.rewrite.ledger import Decision, Entry, record, weight_name
from qgraph.rewrite.rewriter import Visit, rewrite
from qgraph.tracing.tensor import Tensor, apply

from .shared.contraction import as_contraction
from .shared.enter_loops import into_bodies
from .shared.indexing import index_of
from .shared.invariants import as_invariants
from .shared.products import PARTS, parts_of
from .shared.weight_view import TRANSPOSES, WeightView, as_operand, resolve

_NAME = "sink-dequantize"


@dataclass(frozen=True)
class SinkDequantize:
    """See the module."""

    name: str = _NAME
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        graph = into_bodies(as_invariants(graph, self.name), _is_needed_dense, self.name)
        sunk = rewrite(graph, _visitor, self.name)
        return sunk if sunk is graph else into_bodies(sunk, _is_needed_dense, self.name)


@dataclass(frozen=True)
class _Weight:
    """A `dequantize`, and which of its axes each axis of an operand is."""

    source: Node
    axes: tuple[int, ...]

    @staticmethod
    def behind(value: Value) -> _Weight | None:
        axes, node = list(range(value.ndim)), value.node
        while node.op in TRANSPOSES:
            sizes = np.empty([2 + i for i in range(node.output.ndim)], np.uint8)
            order = [size - 2 for size in TRANSPOSES[node.op](sizes, node).shape]
            axes, node = [order[i] for i in axes], node.inputs[0].node
        return _Weight(node, tuple(axes)) if node.op == "dequantize" else None

    @property
    def type(self) -> Any:
        return self.source.output.type

    def of_parts(self, fn: Callable[[Tensor], Tensor]) -> Value:
        """What the operand is when `fn` is done to the packed parts."""
        return self.dequantized([fn(part) for part in parts_of(self.source)])

    def dequantized(self, parts: Sequence[Tensor]) -> Value:
        """Of parts with other rows; one row alone has one axis, and `dequantize` takes two."""
        if parts[0].ndim == 1:
            row = Tensor(self.dequantized([apply("expand_dims", (p, 0)) for p in parts]))
            alone: Tensor = apply("squeeze", (row, 0))
            return alone.value
        options = {k: a for k, a in self.source.args.items() if k not in PARTS}
        dense: Tensor = apply("dequantize", tuple(parts), options, self.source.stream)
        if self.axes == tuple(range(len(self.axes))):
            return dense.value
        transposed: Tensor = apply("transpose", (dense, self.axes))
        return transposed.value


def _visitor(graph: Graph) -> Visit | None:
    if "dequantize" not in graph.ops:
        return None
    dense = {
        node.serial
        for node in graph.nodes
        if node.op == "dequantize" and _is_needed_dense(graph, node)
    }

    def visit(node: Node, _: Node) -> Sequence[Value] | None:
        if node.op not in _RULES or not node.inputs:
            return None
        weight = _Weight.behind(node.inputs[0])
        if weight is None:
            return None
        result = _RULES[node.op](node, weight)
        slices = node.op in ("getitem", "split") and not _is_lookup(node)
        if not isinstance(result, str) and slices and weight.source.serial in dense:
            result = "the whole weight is needed dense by something else as well"
        if isinstance(result, str):
            _note(node, weight, "refused", f"not fused: {result}")
            return None
        _note(node, weight, "fused", "", 6 if _is_lookup(node) else 8)
        return result

    return visit


def _is_needed_dense(graph: Graph, source: Node) -> bool:
    """Does anything read it that neither takes rows of the packed weight nor fuses?"""
    if source.output in graph.outputs:
        return True
    for reader in readers(graph, source.output):
        if reader.op in PRODUCTS:
            if not _fuses(reader):
                return True
        elif reader.op not in _RULES:
            return True
        else:
            weight = _Weight.behind(reader.inputs[0])
            if weight is None or isinstance(_RULES[reader.op](reader, weight), str):
                return True
    return False


def _fuses(product: Node) -> bool:
    weights: Iterable[Value] = (p.weight.value for p in as_contraction(product))
    if product.op == "gather_mm":
        weights = [product.operand("b")]
    found = (w for w in map(resolve, weights) if isinstance(w, WeightView))
    return any(not isinstance(as_operand(w), str) for w in found)


def _is_lookup(node: Node) -> bool:
    """Are rows picked by indices that only the run knows?"""
    return node.op == "take" or (node.op == "getitem" and len(node.inputs) > 1)


_LAST = "groups run along the last axis; index rows, or quantize the transpose"


def _take(node: Node, weight: _Weight) -> list[Value] | str:
    axis, indices = setting(node, "axis"), node.args["indices"]
    if axis is None or weight.axes[axis % len(weight.axes)] == weight.type.ndim - 1:
        return _LAST
    ordered = list(weight.axes) == sorted(weight.axes)
    if isinstance(indices, Value):
        rows = weight.type.shape[weight.axes[axis]]
        if indices.type.size > rows:
            return (
                f"{indices.type.size} rows are looked up in {rows}; "
                "dequantizing all of them once is less work"
            )
        if not ordered and indices.ndim != 1:
            return "look rows up before the weight is transposed"
        indices = Tensor(indices)
    elif not ordered:
        return "look rows up before the weight is transposed"
    place = weight.axes[axis]
    return [weight.of_parts(lambda part: apply("take", (part, indices, place)))]


def _getitem(node: Node, weight: _Weight) -> list[Value] | str:
    parts = _expanded(index_of(node), len(weight.axes))
    if parts is None:
        return "index rows without None"
    index: list[Any] = [slice(None)] * len(weight.axes)
    for axis, part in zip(weight.axes, parts, strict=False):
        index[axis] = part
    if index[-1] != slice(None):
        return _LAST
    ordered = list(weight.axes) == sorted(weight.axes)
    if not ordered and not all(isinstance(p, slice) for p in parts):
        return "index rows before the weight is transposed"
    if node.output.type.size > weight.type.size:
        return "more rows are looked up than there are; dequantizing once is less work"
    place = tuple(Tensor(p) if isinstance(p, Value) else p for p in index[:-1])
    return [weight.of_parts(lambda part: apply("getitem", (part, place)))]


def _expanded(index: Sequence[Any], ndim: int) -> list[Any] | None:
    """The index with `...` written out; None if it adds axes."""
    parts = list(index)
    if any(part is None for part in parts):
        return None
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    for i in dots:
        parts[i : i + 1] = [slice(None)] * (ndim - len(parts) + 1)
    return parts


def _split(node: Node, weight: _Weight) -> list[Value] | str:
    axis = weight.axes[setting(node, "axis")]
    if axis == weight.type.ndim - 1:
        return _LAST
    sections = node.args["indices_or_sections"]
    pieces = [apply("split", (part, sections, axis)) for part in parts_of(weight.source)]
    return [weight.dequantized(piece) for piece in zip(*pieces, strict=True)]


def _concatenate(node: Node, weight: _Weight) -> list[Value] | str:
    weights = [_Weight.behind(v) for v in node.inputs]
    others = [w for w in weights if w is not None]
    if len(others) < len(weights):
        return "not all that is concatenated is packed"
    sources = [w.source for w in others]
    options = [{k: a for k, a in s.args.items() if k not in PARTS} for s in sources]
    dtypes = {str(v.dtype) for s in sources for v in s.inputs[1:]}
    if any(o != options[0] for o in options) or len(dtypes) > 1:
        return "the weights are quantized differently"
    if any(w.axes != weight.axes for w in others):
        return "the weights are transposed differently"
    axis = setting(node, "axis")
    if axis is None or weight.axes[axis] == weight.type.ndim - 1:
        return _LAST
    place = weight.axes[axis]
    columns = zip(*map(parts_of, sources), strict=True)
    return [weight.dequantized([apply("concatenate", (list(c), place)) for c in columns])]


_RULES: dict[str, Callable[[Node, _Weight], list[Value] | str]] = {
    "take": _take,
    "getitem": _getitem,
    "split": _split,
    "concatenate": _concatenate,
}


def _note(node: Node, weight: _Weight, decision: Decision, reason: str, case: int = 0) -> None:
    name = weight_name(weight.source.operand("w"))
    record(Entry.of(node, _NAME, decision, reason, case, name, types=(weight.type,)))
