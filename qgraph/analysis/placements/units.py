"""Units that a split must not tear apart, and so how much of each axis a rank holds.

A product may split its columns anywhere, but not if heads become of them.  So units flow through a
graph, from readers to what they read and back, by the labels that the axes of an op share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...ir.graph import Graph, Node, Value
from ...ir.loops import LOOPS, bodies
from .rules import spec_of
from .spec import Label, Spec, common_unit

Axis = tuple[Value, int]

_SWEEPS = 2
"""From the results to the inputs and back: what two readers ask of a value, its other readers get.
"""


class Units:
    """The units of all axes of a graph's values, in bodies too.

    Args:
        graph: the outermost one.
        ranks: of the mesh.
    """

    def __init__(self, graph: Graph, ranks: int) -> None:
        self.ranks = ranks
        self._units: dict[Axis, int] = {}
        self._specs: dict[Node, Spec | None] = {}
        for _ in range(_SWEEPS):
            self._sweep(graph, backwards=True)
            self._sweep(graph, backwards=False)

    def spec(self, node: Node) -> Spec | None:
        """The node's labels, asked for once."""
        if node not in self._specs:
            self._specs[node] = spec_of(node)
        return self._specs[node]

    def size(self, spec: Spec, label: Label, node: Node) -> int:
        """How many units of a label each rank holds; 0 where they cannot be shared out."""
        count = spec.units[label]
        for unit in (self._of_label(spec, label, node), 1):
            size = ceil_div(ceil_div(count, unit), self.ranks) * unit
            if size < count:
                return size
        return 0

    def length(self, value: Value, axis: int) -> int:
        """How much of an axis each rank holds, in whole units; 0 where it cannot be shared out."""
        unit = self._units.get((value, axis), 1)
        size = ceil_div(ceil_div(value.shape[axis], unit), self.ranks) * unit
        return size if size < value.shape[axis] else 0

    def rows(self, length: int) -> int:
        """How many rows of a table of `length` rows each rank holds; 0 if it cannot be split.

        As many as of a product with the same table, the head that an embedding often is.
        """
        unit = common_unit(length)
        size = ceil_div(length // unit, self.ranks) * unit
        return size if size < length else ceil_div(length, self.ranks) % length

    def _sweep(self, graph: Graph, backwards: bool) -> None:
        for node in reversed(graph.nodes) if backwards else graph.nodes:
            if node.op in LOOPS:
                self._through_loop(node)
            for body in node.bodies:
                self._sweep(body, backwards)
            if node.op in LOOPS:
                self._through_loop(node)
            elif not node.bodies and node.op != "constant":
                self._through(node)

    def _through(self, node: Node) -> None:
        spec = self.spec(node)
        if spec is None:
            return
        for label, count in spec.units.items():
            unit = self._of_label(spec, label, node)
            if unit > 1 and 2 * unit <= count:
                for value, axis, per in _axes_of(spec, label, node):
                    self._units[value, axis] = unit * per
            else:
                for value, axis, per in _axes_of(spec, label, node):
                    if per > 1:
                        self._units.setdefault((value, axis), per)

    def _of_label(self, spec: Spec, label: Label, node: Node) -> int:
        """The smallest number of a label's units that leaves the units of all its axes whole."""
        unit, count = 1, spec.units[label]
        for value, axis, per in _axes_of(spec, label, node):
            asked = math.lcm(unit, math.lcm(self._units.get((value, axis), 1), per) // per)
            if 2 * asked <= count:  # else nothing would be left to share out
                unit = asked
        return unit

    def _through_loop(self, node: Node) -> None:
        """What a loop carries has one placement before, after and between its turns."""
        body = bodies(node)[-1]
        count = len(body.carried)
        carried = zip(
            node.args["carried"], body.carried, body.graph.outputs[:count], node.outputs[:count],
            strict=True,
        )  # fmt: skip
        same: list[tuple[Value, ...]] = [*carried, *((o, i) for i, o in body.shared)]
        for values in same:
            for axis in range(values[0].ndim):
                unit = math.lcm(*(self._units.get((v, axis), 1) for v in values))
                if unit > 1:
                    self._units.update(((v, axis), unit) for v in values)


def ceil_div(count: int, parts: int) -> int:
    """How many each of `parts` gets of `count`, at most."""
    return -(-count // parts)


def _axes_of(spec: Spec, label: Label, node: Node) -> Iterator[tuple[Value, int, int]]:
    """The axes that bear a label, with their elements to a unit."""
    pairs = (*zip(node.inputs, spec.operands, strict=True),
             *zip(node.outputs, spec.results, strict=True))  # fmt: skip
    for value, dims in pairs:
        for axis, dim in enumerate(dims):
            if dim is not None and dim.label == label:
                yield value, axis, dim.per
