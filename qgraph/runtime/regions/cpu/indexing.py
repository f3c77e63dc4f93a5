"""Elements picked by arrays of numbers, and written to places that such arrays give.

An index is read as NumPy reads it: arrays (and plain numbers beside them) that follow one another
leave their axes where the first of them stands, others put theirs in front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ....ir.graph import Node, Value
from ....ir.ops import setting
from ..arrays import Array
from ..unknown import Unknown
from .chains import Chain
from .moves import along_with_indices
from .refs import FLOATS, fill, h, ref
from .translate import Translator, kind
from .views import by_item, spelled_out


@dataclass(frozen=True)
class Place:
    """What an index says of an array.

    Attributes:
        window: what slices and numbers leave of it.
        axes: axes of the window that arrays pick along.
        picks: those arrays, of one shape.
        before: how many axes of the result stand before those of the picks.
    """

    window: Array
    axes: tuple[int, ...]
    picks: tuple[Array, ...]
    before: int

    @property
    def sizes(self) -> list[int]:
        return [self.window.shape[axis] for axis in self.axes]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is picked."""
        rest = [n for axis, n in enumerate(self.window.shape) if axis not in self.axes]
        return (*rest[: self.before], *self.picks[0].shape, *rest[self.before :])


def placed(t: Translator, index: Any, a: Array) -> Place | Array:
    """The place that an index names; a view where it holds no arrays."""
    items = spelled_out(index, a.ndim)
    wild = [i for i, item in enumerate(items) if isinstance(item, Value)]
    if any(isinstance(item, Value) and not mx.issubdtype(item.dtype, mx.integer) for item in items):
        raise Unknown("an index of booleans")
    picking = [i for i, item in enumerate(items) if isinstance(item, int | Value)] if wild else []
    window, axis, before = a, 0, 0
    axes: list[int] = []
    picks: list[Array] = []
    for i, item in enumerate(items):
        if picking and i == picking[0]:
            before = axis - len(axes)
        if isinstance(item, Value):
            axes.append(axis)
            picks.append(t.array(item))
            axis += 1
        else:
            window, axis = by_item(window, axis, item)
    if not axes:
        return window
    if picking != list(range(picking[0], picking[-1] + 1)):
        before = 0
    shape = _broadcast([p.shape for p in picks])
    return Place(window, tuple(axes), tuple(p.broadcast(shape) for p in picks), before)


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    made = [1] * max(map(len, shapes))
    for shape in shapes:
        for i, n in enumerate(reversed(shape)):
            made[-1 - i] = n if made[-1 - i] == 1 else made[-1 - i]
    return tuple(made)


def _joined(t: Translator, place: Place, steps: Sequence[int]) -> Array:
    """One array of the picks, each brought into its axis and taken `steps` times, added up."""

    def make(chain: Chain) -> int:
        def number(value: int) -> int:
            return chain.constant(value, mx.int64)

        total = number(0)
        for pick, size, step in zip(place.picks, place.sizes, steps, strict=True):
            at = chain.read(pick)
            if pick.dtype != mx.int64:
                at = chain.add(h.OP_CAST, mx.int64, (at,))
            low = chain.add(h.OP_LESS, mx.int64, (at, number(0)))
            from_end = chain.add(h.OP_ADD, mx.int64, (at, number(size)))
            at = chain.add(h.OP_WHERE, mx.int64, (low, from_end, at))
            at = chain.add(h.OP_MAXIMUM, mx.int64, (at, number(0)))
            at = chain.add(h.OP_MINIMUM, mx.int64, (at, number(max(0, size - 1))))
            at = chain.add(h.OP_MULTIPLY, mx.int64, (at, number(step)))
            total = chain.add(h.OP_ADD, mx.int64, (total, at))
        return total

    return t.computed(place.picks[0].shape, mx.int64, make, *place.picks)


@kind("getitem")
def gathered(t: Translator, node: Node) -> None:
    """`getitem` with arrays."""
    place = placed(t, node.args["index"], t.array(node.operand("a")))
    assert isinstance(place, Place)
    if place.shape != node.output.shape:
        raise Unknown("an index that is read in another way")
    window, sizes = place.window, place.sizes
    rest = [axis for axis in range(window.ndim) if axis not in place.axes]
    order = [*rest[: place.before], *place.axes, *rest[place.before :]]
    x = t.contiguous(window.transposed(order), node)
    steps = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    indices = _joined(t, place, steps)
    y = t.result(node)
    absent = ref(None)
    args = fill(
        h.Take(), x=ref(x), y=ref(y), scales=absent, biases=absent, indices=ref(indices),
        outer=math.prod(x.shape[: place.before]), length=math.prod(sizes),
        inner=math.prod(x.shape[place.before + len(sizes) :]), count=indices.size, mode=h.DENSE,
    )  # fmt: skip
    t.step(h.TAKE, args, [x, indices], [y], node)


_UPDATES = {
    "at_set": h.SET, "at_add": h.SUM, "at_subtract": h.SUM, "at_multiply": h.PROD,
    "at_divide": h.PROD, "at_maximum": h.MAX, "at_minimum": h.MIN,
}  # fmt: skip


@kind(*_UPDATES)
def update(t: Translator, node: Node) -> None:
    """Elements of a copy set to others, or joined with them, one after another."""
    y = t.own(node.operand("a"), node)
    place = placed(t, node.args["index"], y)
    shape = place.shape
    x = _updates(t, node, shape, y.dtype)
    t.places[node.output] = y
    if isinstance(place, Array):  # each element once: a scatter of one pick
        window, offsets, order, count = place, t.filled(0, mx.int64), list(range(place.ndim)), 1
        reach, rest = [(0, 0)], list(range(place.ndim))
        steps: list[int] = []
    else:
        window = place.window
        steps = [window.strides[axis] for axis in place.axes]
        offsets = _joined(t, place, steps)
        count = offsets.size
        reach = [(step * (n - 1), 0) for step, n in zip(steps, place.sizes, strict=True)]
        rest = [axis for axis in range(window.ndim) if axis not in place.axes]
        picked = range(place.before, place.before + len(place.picks[0].shape))
        order = [*(axis for axis in range(len(shape)) if axis not in picked), *picked]
    x = x.transposed(order)
    flat = x.reshaped((*(window.shape[axis] for axis in rest), count))
    if flat is None:
        flat = t.copied(x, node).reshaped((*(window.shape[axis] for axis in rest), count))
    assert flat is not None
    args = fill(
        h.Scatter(), x=ref(flat), y=ref(window), offsets=ref(offsets), rank=len(rest),
        shape=[window.shape[axis] for axis in rest], x_strides=flat.strides[:-1],
        y_strides=[window.strides[axis] for axis in rest], count=count, x_axis=flat.strides[-1],
        low=sum(min(r) for r in reach), high=sum(max(r) for r in reach), op=_UPDATES[node.op],
    )  # fmt: skip
    t.step(h.SCATTER, args, [flat, y, offsets], [y], node)


def _updates(t: Translator, node: Node, shape: tuple[int, ...], dtype: mx.Dtype) -> Array:
    """What is written, in the dtype of the goal and of the shape of the place."""
    given = node.args["updates"]
    inverse = {"at_subtract": h.OP_NEGATIVE, "at_divide": h.OP_RECIPROCAL}.get(node.op)
    if inverse == h.OP_RECIPROCAL and dtype not in FLOATS:
        raise Unknown("a division of integers")
    if not isinstance(given, Value):
        number = {h.OP_NEGATIVE: -given, h.OP_RECIPROCAL: 1 / (given or 1)}.get(inverse, given)
        if inverse == h.OP_RECIPROCAL and not given:
            number = math.inf
        return t.filled(number, dtype).broadcast(shape)
    array = t.array(given)
    while array.ndim > len(shape) and array.shape[0] == 1:
        array = array.without(0)
    if array.dtype != dtype or inverse is not None:
        source = array

        def make(chain: Chain) -> int:
            number = chain.read(source)
            if source.dtype != dtype:
                number = chain.add(h.OP_CAST, dtype, (number,))
            return number if inverse is None else chain.add(inverse, dtype, (number,))

        array = t.computed(source.shape, dtype, make, source)
    return array.broadcast(shape)


@kind("put_along_axis")
def put_along_axis(t: Translator, node: Node) -> None:
    y = t.own(node.operand("a"), node)
    axis = setting(node, "axis")
    indices, values = t.array(node.operand("indices")), node.args["values"]
    if axis is None:
        raise Unknown("put_along_axis of all axes")
    t.places[node.output] = y
    shape = list(y.shape)
    shape[axis] = indices.shape[axis]
    picks = indices.broadcast(shape)
    x = t.array(values) if isinstance(values, Value) else t.filled(values, y.dtype)
    if x.dtype != y.dtype:
        raise Unknown("an update of another dtype")
    rows = along_with_indices(picks, axis % y.ndim, x.broadcast(shape), y)
    rows.put = 1
    t.step(h.TAKE_ALONG, rows, [x, y, indices], [y], node)
