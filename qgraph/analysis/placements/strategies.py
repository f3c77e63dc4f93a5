"""Ways to carry out a node on a mesh: which placements it takes and which it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ...ir.graph import Node, Value
from .placement import PARTIAL, REPLICATED, Placement, owned, split
from .spec import Dims, Label, Spec
from .units import Units

Build = Callable[[Any, Node, Sequence[Value]], Sequence[Value]]
"""Makes the results out of local operands; gets who emits, the node and the operands."""


class Strategy(NamedTuple):
    """One way to carry out a node.

    Attributes:
        needs: the placement of each input.
        gives: that of each output.
        share: of the node's work that each rank does.
        seconds: that a loop takes.
        talks: its own collectives, and their bytes.
        build: how, where it is not the same op on what a rank holds.
        contracted: inputs that the op sums over along their split axis.
    """

    needs: tuple[Placement, ...]
    gives: tuple[Placement, ...]
    share: float = 1.0
    seconds: float = 0.0
    build: Build | None = None
    contracted: frozenset[int] = frozenset()
    talks: tuple[tuple[str, int], ...] = ()


def whole(node: Node) -> Strategy:
    """Every rank does all of it."""
    return Strategy((REPLICATED,) * len(node.inputs), (REPLICATED,) * len(node.outputs))


def strategies(node: Node, units: Units) -> list[Strategy]:
    """All ways that the op's rule allows, but for doing it whole."""
    spec = units.spec(node)
    if spec is None:
        return []
    found = []
    for label in (label for label in spec.units if label not in spec.whole):
        size = units.size(spec, label, node)
        way = _along(node, spec, label, size) if size else None
        if way is not None:
            found.append(way)
    found += _on_partial_sums(node, spec)
    if spec.table is not None:
        found += _by_rows(node, spec, units)
    return found


def _along(node: Node, spec: Spec, label: Label, size: int) -> Strategy | None:
    needs = tuple(_at(dims, label, size) for dims in spec.operands)
    gives = tuple(_at(dims, label, size) for dims in spec.results)
    if label in spec.sums:
        needs = tuple(PARTIAL if i in spec.added else p for i, p in enumerate(needs))
        gives = (PARTIAL,) * len(gives)
    elif REPLICATED in gives:
        return None  # what is split would have to be joined
    contracted = frozenset(
        i for i, p in enumerate(needs) if label in spec.sums and p.kind == "split"
    )
    return Strategy(needs, gives, size / spec.units[label], contracted=contracted)


def _at(dims: Dims, label: Label, size: int) -> Placement:
    for axis, dim in enumerate(dims):
        if dim is not None and dim.label == label:
            return split(axis, size * dim.per)
    return REPLICATED


def _on_partial_sums(node: Node, spec: Spec) -> Iterator[Strategy]:
    if not all(mx.issubdtype(v.dtype, mx.inexact) for v in node.outputs):
        return
    count = len(node.inputs)
    if not all(mx.issubdtype(v.dtype, mx.inexact) for v in node.inputs[:1]):
        return
    gives = (PARTIAL,) * len(node.outputs)
    if spec.partial == "all":
        yield Strategy((PARTIAL,) * count, gives)
    elif spec.partial == "first":
        yield Strategy((PARTIAL, *(REPLICATED,) * (count - 1)), gives)
    elif spec.partial == "each":
        for i in range(count):
            needs = tuple(PARTIAL if j == i else REPLICATED for j in range(count))
            yield Strategy(needs, gives)


def _by_rows(node: Node, spec: Spec, units: Units) -> Iterator[Strategy]:
    """A look-up in a table whose rows are split: each result is right on the rank of its row."""
    assert spec.table is not None
    table, index = spec.table
    indices = node.inputs[index]
    first = node.inputs[table]
    rows = first.shape[0]
    if not mx.issubdtype(indices.dtype, mx.integer) or node.output.shape[: indices.ndim] != (
        indices.shape
    ):
        return
    product = node.op in ("gather_mm", "gather_qmm")
    tables = [table]
    if product:
        tables += [i for i in range(table + 1, len(node.inputs)) if node.inputs[i].ndim == 3
                   and node.op == "gather_qmm" and i <= table + 2 and i != index]  # fmt: skip
    size = units.rows(rows)
    if not size:
        return
    for x in (REPLICATED, owned(indices, size)) if product else (REPLICATED,):
        if x.kind == "owned" and node.inputs[0].shape[: indices.ndim] != indices.shape:
            continue
        needs = [REPLICATED] * len(node.inputs)
        for i in tables:
            needs[i] = split(0, size)
        if product:
            needs[0] = x

        def build(emit: Any, node: Node, local: Sequence[Value]) -> Any:
            return emit.look_up(node, local, index, size)

        yield Strategy(tuple(needs), (owned(indices, size),), build=build)


def on_owned(node: Node, spec: Spec | None, rows: Placement) -> Strategy | None:
    """An op that treats rows apart, on operands that are owned in the same way."""
    if spec is None or not spec.pointwise or rows.indices is None:
        return None
    shape = rows.indices.shape
    out = node.output.shape
    if len(node.outputs) > 1 or out[: len(shape)] != shape or len(out) == len(shape):
        return None
    needs = tuple(
        rows if len(v.shape) == len(out) and v.shape[: len(shape)] == shape else REPLICATED
        for v in node.inputs
    )
    return Strategy(needs, (rows,))
