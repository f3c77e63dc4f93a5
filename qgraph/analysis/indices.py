"""The indices in a graph, and whether they lie within what they index.

MLX reads and writes wherever an index points.  A graph out of a file may hold any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod

import mlx.core as mx

from ..ir.graph import Graph, Node, Value
from ..ir.kinds import SAME_ELEMENTS
from ..ir.loops import constants_behind
from ..ir.ops import setting
from ..tracing.fatal import indexed_axes

Bound = tuple[Value, int, int]
"""Indices, the first that is allowed, and the first that is not any more."""


def stray_index(graph: Graph) -> tuple[Node, str] | None:
    """A node whose constant indices point outside, and in words where to; None if there is none."""
    behind = constants_behind(graph)
    for _, node in graph.walk():
        for value, first, end in bounds(node):
            source = _whole(value, behind)
            if source.node.op != "constant" or source.node.args["data"].is_released:
                continue
            array = source.node.args["data"].array
            if not array.size or not mx.issubdtype(array.dtype, mx.integer):
                continue
            low, high = (int(fn(array).item()) for fn in (mx.min, mx.max))  # type: ignore[arg-type]
            if low < first or high >= end:
                return node, f"holds indices from {low} to {high}, {first} to {end - 1} are"
    return None


def _whole(value: Value, behind: Mapping[Value, Value]) -> Value:
    """What holds the elements of a value, all of them and no others."""
    while value in behind or value.node.op in SAME_ELEMENTS:
        value = behind[value] if value in behind else value.node.inputs[0]
    return value


def bounds(node: Node) -> Iterator[Bound]:
    """The indices that a node reads or writes by, each with its bounds."""
    check = _CHECKS.get(node.op)
    if check is not None:
        yield from check(node)


def known_range(value: Value, behind: Mapping[Value, Value]) -> tuple[int, int] | None:
    """The least and the largest that a value can be, if its own node says so.

    >>> import mlx.core as mx, qgraph as qg
    >>> graph = qg.trace(lambda x: qg.argmax(x, axis=1), qg.spec((2, 5)))
    >>> known_range(graph.outputs[0], {})
    (0, 4)
    """
    source = _whole(value, behind)
    node = source.node
    if node.op == "constant" or not source.type.size:
        return 0, -1  # `stray_index` has seen to it, or there is nothing
    if node.op in _PLACES:
        axis, a = setting(node, "axis"), node.operand("a")
        return 0, (a.type.size if axis is None else a.shape[axis]) - 1
    if node.op == "clip":
        low, high = (_number(node.args[name], behind) for name in ("a_min", "a_max"))
        return None if low is None or high is None else (low, high)
    return None


_PLACES = frozenset({"argmax", "argmin", "argsort", "argpartition"})


def _number(arg: object, behind: Mapping[Value, Value]) -> int | None:
    """An integer that a node is given, as it is or as a constant."""
    if isinstance(arg, Value):
        node = _whole(arg, behind).node
        known = node.op == "constant" and not node.args["data"].is_released
        arg = node.args["data"].array.item() if known and arg.type.size == 1 else None
    return arg if type(arg) is int else None


def _around(value: object, size: int) -> Iterator[Bound]:
    """Indices that count from the end where they are negative."""
    if isinstance(value, Value):
        yield value, -size, size


def _getitem(node: Node) -> Iterator[Bound]:
    shape = node.operand("a").shape
    for axis, part in indexed_axes(len(shape), node.args["index"]):
        yield from _around(part, shape[axis])


def _take(node: Node) -> Iterator[Bound]:
    a, axis = node.operand("a"), setting(node, "axis")
    yield from _around(node.args["indices"], a.type.size if axis is None else a.shape[axis])


def _slice(node: Node) -> Iterator[Bound]:
    a, axes = node.operand("a"), node.args["axes"]
    sizes = node.args["slice_size"] if node.op == "slice" else node.operand("update").shape
    room = min((a.shape[axis] - sizes[axis] for axis in axes), default=0)
    yield node.operand("start_indices"), 0, room + 1


def _gathered(left: str, right: str) -> Callable[[Node], Iterator[Bound]]:
    def bounds(node: Node) -> Iterator[Bound]:
        for name, of in (("lhs_indices", left), ("rhs_indices", right)):
            indices, operand = node.value(name), node.args[of]
            matrices = operand[0] if isinstance(operand, tuple) else operand
            if indices is not None:
                yield indices, 0, prod(matrices.shape[:-2])

    return bounds


_CHECKS: dict[str, Callable[[Node], Iterator[Bound]]] = {
    "getitem": _getitem,
    **dict.fromkeys((f"at_{m}" for m in ("set", "add", "subtract", "multiply", "divide",
                                         "maximum", "minimum")), _getitem),
    **dict.fromkeys(("take", "take_along_axis", "put_along_axis"), _take),
    **dict.fromkeys(("slice", "slice_update"), _slice),
    "gather_mm": _gathered("a", "b"),
    "gather_qmm": _gathered("x", "w"),
    "packed_gather": _gathered("x", "packed"),
    "segmented_mm": lambda node: iter(
        [(node.operand("segments"), 0, node.operand("a").shape[-1] + 1)]
    ),
}  # fmt: skip
