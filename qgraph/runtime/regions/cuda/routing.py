"""A router's numbers in a region: which experts a row has, and what each of them counts for.

They come of a product of as many columns as there are experts.  Each block computes them for
itself, a row by a warp, and keeps them in its shared memory, so that no barrier is waited for.  The
parts that the text is made of are in `kernels/cuda/routing.cuh`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from ....ir.graph import Node, Value, is_scalar
from ....ir.ops import setting
from ..unknown import Unknown
from .expressions import (
    FLOATS,
    OPERATIONS,
    TYPES,
    Expression,
    Leaf,
    Routed,
    in_order,
    literal,
)

MOST = 512
"""Columns of a row, that is experts."""
SORTING = frozenset({"argpartition", "argsort"})
OPS = frozenset({"softmax", "take_along_axis", "sum", "getitem", "reshape", *SORTING, *OPERATIONS})
"""What a router is made of, beside its product."""


@dataclass(eq=False)
class Router:
    """What is computed before a phase, of what earlier ones gave.

    Attributes:
        rows: of each of its arrays.
        before: the phase, -1 until it is known.
        after: the last phase that it reads.
        arrays: in shared memory; those that are `kept` are read by later phases, the others lie
            where rows of x will.
        lines: of one row, `n`.
    """

    rows: int
    before: int = -1
    after: int = -1
    arrays: dict[Routed, bool] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def new(self, width: int, dtype: mx.Dtype, name: str) -> Routed:
        made = Routed(name, dtype, width)
        self.arrays[made] = False
        return made

    def nbytes(self, *, kept: bool) -> int:
        return sum(self.size(array) for array, is_kept in self.arrays.items() if is_kept == kept)

    def size(self, array: Routed) -> int:
        return -(-4 * self.rows * array.width // 16) * 16

    def text(self) -> Iterator[str]:
        yield f"if (threadIdx.x / 32 < {self.rows}) {{"
        yield "const int n = threadIdx.x / 32;"
        yield from self.lines
        yield "}"
        yield "__syncthreads();"


class Routing:
    """Translates the nodes of routers.

    Attributes:
        name: gives the name of an input of the region.
        routers: in the order of the phases before which they are done.
        known: what is in an array of a router, and in which.
        sorted: what is in order, and what that was before.
    """

    def __init__(self, name: Callable[[Value], str]) -> None:
        self.name = name
        self.routers: list[Router] = []
        self.known: dict[Value, tuple[Router, Routed]] = {}
        self.sorted: dict[Value, Value] = {}
        self.count = 0

    def has(self, node: Node) -> bool:
        """Is a node part of a router, and not of what takes its results?"""
        if node.op in ("softmax", *SORTING):
            return True
        wide = node.op in OPS and math.prod(node.output.shape) <= MOST * 8
        numbers = [v for v in node.inputs if not is_scalar(v)]
        if node.op in OPERATIONS and numbers and all(map(_is_one_of_a_row, numbers)):
            return True  # such as the gate of an expert that all rows have
        mine = [v for v in numbers if v in self.known or v in self.sorted]
        if node.op == "take_along_axis":
            return node.operand("indices") in self.known
        return wide and bool(mine) and all(v in mine or v.node.op == "input" for v in numbers)

    def take(self, node: Node, source: Leaf | None, rows: int) -> None:
        """Adds a node.

        Args:
            source: its first operand where that is in no router's array, but in memory.
            rows: of the region.
        """
        if node.op in SORTING:
            self.sorted[node.output] = node.inputs[0]
            if node.inputs[0] not in self.known:
                self._load(node.inputs[0], source, rows)
            return
        if node.op == "reshape":
            if node.inputs[0] in self.sorted:
                raise Unknown("another shape of what a router has sorted")
            self.known[node.output] = self.known[node.inputs[0]]
            return
        if node.inputs[0] not in self.known and node.inputs[0] not in self.sorted:
            self._load(node.inputs[0], source, rows)
        value = node.output
        router = self._latest(node)
        width = value.type.size // rows
        if node.op == "getitem":
            self._selected(node, rows)
            return
        if value.ndim == 0 or value.shape[-1] not in (1, width):
            raise Unknown(f"a router's {node.op} that gives {value.type}")
        made = self._array(router, value, width)
        if node.op == "softmax":
            (x,) = self._of(node)
            _last_axis(node)
            router.lines.append(
                f"softmax_of_row<{TYPES[value.dtype]}, {width}>({_row(x)}, {_row(made)});"
            )
        elif node.op == "take_along_axis":
            x, at = (self.known[node.operand(name)][1] for name in ("a", "indices"))
            _last_axis(node)
            self._each(router, made, f"{_row(x)}[{_row(at)}[i]]")
        elif node.op == "sum":
            (x,) = self._of(node)
            _last_axis(node)
            if width != 1:
                raise Unknown("a router's sum over another axis than the last")
            total = f"sum_of_row<{x.width}>([&](int i) {{ return {_row(x)}[i]; }})"
            router.lines.append(f"{{ const float total = {total};")
            self._each(router, made, f"rounded<{TYPES[value.dtype]}>(total)")
            router.lines[-1] += " }"
        else:
            args = [self._operand(v, width) for v in node.inputs]
            number = OPERATIONS[node.op].format(*args)
            self._each(router, made, f"rounded<{TYPES[value.dtype]}>({number})")
        self.known[value] = router, made

    def number(self, value: Value) -> Routed:
        """One number of each row, which all columns beside it are computed with."""
        _, array = self.known[value]
        if array.width != 1 or array.dtype not in FLOATS:
            raise Unknown(f"a router's {value.type} beside rows")
        return self.keep(value)[1]

    def precedes(self, phase: int, *expressions: Expression) -> bool:
        """Have the routers that some expressions read done so when a phase's product is finished?
        If they can have, they are from now on."""
        read = {x for e in expressions for x in in_order(e) if isinstance(x, Routed)}
        routers = [router for router in self.routers if read & router.arrays.keys()]
        if any(router.after >= phase for router in routers):
            return False
        for router in routers:
            router.before = phase if router.before < 0 else min(router.before, phase)
        return True

    def indices(self, value: Value) -> tuple[Router, Routed]:
        """Experts of each row, in an array that is kept."""
        found = self.known.get(value)
        if found is None or found[1].dtype not in (mx.uint32, mx.int32):
            raise Unknown("experts that no router of the region has chosen")
        return self.keep(value)

    def keep(self, value: Value) -> tuple[Router, Routed]:
        router, array = self.known[value]
        router.arrays[array] = True
        return router, array

    # ---- parts

    def _load(self, value: Value, source: Leaf | None, rows: int) -> None:
        if source is None or value.dtype not in FLOATS:
            raise Unknown("a router of what is in no memory")
        width = value.shape[-1]
        if width > MOST or value.type.size != width * rows:
            raise Unknown(f"a router of {value.type}; up to {MOST} columns")
        last = self.routers[-1] if self.routers else None
        if last is None or 0 <= last.before <= source.after:
            self.routers.append(Router(rows))
        router = self.routers[-1]
        router.after = max(router.after, source.after)
        made = self._array(router, value, width)
        place = f"n * {source.columns} + {source.offset} + i"
        self._each(router, made, f"float(load_shared({source.name} + {place}))")
        self.known[value] = router, made

    def _array(self, router: Router, value: Value, width: int) -> Routed:
        self.count += 1
        return router.new(width, value.dtype, f"routed{self.count}")

    def _each(self, router: Router, made: Routed, number: str) -> None:
        router.lines.append(
            f"along_row<{made.width}>([&](int i) {{ {_row(made)}[i] = {number}; }});"
        )

    def _of(self, node: Node) -> list[Routed]:
        return [self.known[v][1] for v in node.inputs]

    def _latest(self, node: Node) -> Router:
        found = [self.known[v][0] for v in node.inputs if v in self.known]
        found += [self.known[self.sorted[v]][0] for v in node.inputs if v in self.sorted]
        return max(found, key=self.routers.index)

    def _operand(self, value: Value, width: int) -> str:
        if is_scalar(value):
            return literal(float(value.node.args["data"].array.item()))
        if value not in self.known:
            if value.type.size != width or value.shape[-1] != width or value.dtype not in FLOATS:
                raise Unknown(f"a router's operand that is {value.type}")
            return f"float(load_shared({self.name(value)} + i))"
        array = self.known[value][1]
        if array.dtype not in FLOATS or array.width not in (1, width):
            raise Unknown(f"{array.width} of {array.dtype} beside {width} numbers of a router")
        return f"{_row(array)}[{'i' if array.width > 1 else '0'}]"

    def _selected(self, node: Node, rows: int) -> None:
        """The first or the last of a row that was sorted, or parted there."""
        if node.inputs[0] not in self.sorted:
            raise Unknown("a part of a router's row")
        ordered = node.inputs[0].node
        source = self.sorted[node.inputs[0]]
        router, x = self.known[source]
        _last_axis(ordered)
        width, count = source.shape[-1], node.output.shape[-1]
        first = _start(node)
        if first is None or first not in (0, width - count):
            raise Unknown("neither the first nor the last of a row that was sorted")
        last = first > 0 or count == width
        if ordered.op == "argpartition":
            kth = ordered.args["kth"] % width
            if kth != first if last else kth not in (count - 1, count):
                raise Unknown(f"{count} of a row that is parted at {kth}")
        made = self._array(router, node.output, count)
        way = f"{width}, {count}, {str(last).lower()}"
        router.lines.append(f"select_of_row<{way}>({_row(x)}, {_row(made)});")
        self.known[node.output] = router, made


def _is_one_of_a_row(value: Value) -> bool:
    return value.ndim > 0 and value.shape[-1] == 1 and value.dtype in FLOATS


def _row(array: Routed) -> str:
    return f"({array.name} + n * {array.width})"


def _last_axis(node: Node) -> None:
    axis, ndim = setting(node, "axis"), node.inputs[0].ndim
    if isinstance(axis, tuple | list):
        (axis,) = axis if len(axis) == 1 else (None,)
    if axis is None or axis % ndim != ndim - 1:
        raise Unknown(f"a router's {node.op} along axis {axis}")


def _start(node: Node) -> int | None:
    """The first column of a slice that takes all of the other axes; None if it is another."""
    index, source = node.args["index"], node.inputs[0]
    parts = index if isinstance(index, tuple) else (index,)
    if parts and parts[0] is Ellipsis:
        parts = (slice(None),) * (source.ndim - len(parts) + 1) + tuple(parts[1:])
    if len(parts) != source.ndim or not all(isinstance(part, slice) for part in parts):
        return None
    places = [p.indices(size) for p, size in zip(parts, source.shape, strict=True)]
    if any(step != 1 for _, _, step in places):
        return None
    if any(p[:2] != (0, size) for p, size in zip(places[:-1], source.shape[:-1], strict=True)):
        return None
    return int(places[-1][0])
