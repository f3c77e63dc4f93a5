"""Collectives as nodes: what stands around them, what they should take, and why they are there."""

from __future__ import annotations

import math

from qgraph.analysis.placements import Placement
from qgraph.ir.graph import Node, Value
from qgraph.mesh import Mesh
from qgraph.rewrite.ledger import Entry, record
from qgraph.tracing.tensor import Tensor, apply

_ON_WHOLE = frozenset({"all_sum", "all_max", "all_min"})
"""Collectives that need not be told how many ranks there are."""

_WHY = {
    "partial": "it is partial sums",
    "split": "each rank holds a part of it",
    "owned": "each rank looked up the rows that it holds",
}


class Collectives:
    """Makes the collectives of a mesh.

    Args:
        made_by: the pass, for the ledger.
    """

    def __init__(self, mesh: Mesh, made_by: str) -> None:
        self._mesh = mesh
        self._made_by = made_by

    def within(self, op: str, local: Value, node: Node) -> Value:
        """One that a node needs to be carried out on parts of its operands."""
        what = f"{op} of {local.type} in {node.op}"
        why = f"{node.op} is over a split axis: {self._expected(op, local)} expected"
        record(Entry(self._made_by, "inserted", what, node.origin, why))
        return self._made(op, local)

    def gathered(self, local: Value, node: Node) -> Value:
        """(ranks, …) of what each rank has, for a node as above."""
        return self.within("all_gather", apply("expand_dims", (Tensor(local), 0)).value, node)

    def all_sum(self, local: Value, value: Value, one: Placement, reader: Node | None) -> Value:
        """The whole of a value that is partial sums, or zeros but for what a rank owns."""
        rows = value.type.rows if one.kind == "partial" else None
        return self._for("all_sum", local, value, one, reader, rows)

    def gather(self, local: Value, value: Value, one: Placement, reader: Node | None) -> Value:
        """The whole of a split value.

        Parts are joined along the first axis: those along another are brought there and back.
        """
        joined = Tensor(self._for("all_gather", local, value, one, reader))
        axis, shape = one.axis, local.shape
        whole = [*shape]
        whole[axis] *= self._mesh.size
        if math.prod(shape[:axis]) > 1:
            joined = apply("reshape", (joined, (self._mesh.size, *shape)))
            joined = apply("moveaxis", (joined, 0, axis))
        if tuple(whole) != joined.shape:
            joined = apply("reshape", (joined, tuple(whole)))
        if whole[axis] != value.shape[axis]:
            places = [slice(None)] * axis + [slice(0, value.shape[axis])]
            joined = apply("getitem", (joined, tuple(places)))
        result: Value = joined.value
        return result

    def scatter(
        self, local: Value, value: Value, one: Placement, want: Placement, reader: Node | None
    ) -> Value:
        """This rank's part of a value that is partial sums."""
        axis, shape, ranks = want.axis, list(local.shape), self._mesh.size
        x = Tensor(local)
        if math.prod(shape[:axis]) > 1:
            x = apply("reshape", (x, (*shape[:axis], ranks, want.size, *shape[axis + 1 :])))
            x = apply("moveaxis", (x, axis, 0))
        part = [*shape]
        part[axis] = want.size
        if axis:
            rows = ranks * math.prod(part[: axis + 1])
            x = apply("reshape", (x, (rows, *part[axis + 1 :])))
        found = self._for("sum_scatter", x.value, value, one, reader)
        result: Value = apply("reshape", (Tensor(found), tuple(part))).value if axis else found
        return result

    def _for(
        self,
        op: str,
        local: Value,
        value: Value,
        one: Placement,
        reader: Node | None,
        rows: int | None = None,
    ) -> Value:
        needs = "the graph gives it" if reader is None else f"{reader.op} needs it"
        what = f"{op} of {value.type} from {value.node.op}"
        why = f"{_WHY[one.kind]}, and {needs} whole: {self._expected(op, local, rows)} expected"
        record(Entry(self._made_by, "inserted", what, value.node.origin, why))
        return self._made(op, local, rows)

    def _made(self, op: str, local: Value, rows: int | None = None) -> Value:
        args = (Tensor(local),) if op in _ON_WHOLE else (Tensor(local), self._mesh.size)
        node: Node = apply(f"distributed.{op}", args).value.node
        how = f"{op} over {self._mesh.backend}, {self._expected(op, local, rows)}"
        return node.replace(kernel=how).output

    def _expected(self, op: str, local: Value, rows: int | None = None) -> str:
        nbytes = local.type.nbytes * (self._mesh.size if op == "all_gather" else 1)
        return f"{nbytes} bytes, {1e6 * self._mesh.seconds(op, nbytes, rows):.0f} µs"
