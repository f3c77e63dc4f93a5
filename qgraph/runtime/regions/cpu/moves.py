"""Elements moved: gathers, joins, slices and updates at positions that only the run knows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ....ir.graph import Node, Value
from ....ir.ops import setting
from ..arrays import Array, row_major
from ..unknown import Unknown
from .chains import Chain
from .patterns import TakenRows, is_plain_dequantize, packing
from .products import MODES
from .refs import fill, h, ref
from .translate import PATTERNS, Translator, kind


@kind("take")
def take(t: Translator, node: Node) -> None:
    x = t.contiguous(node.operand("a"), node)
    axis = setting(node, "axis")
    indices = _indices(t, node)
    if axis is None:
        outer, length, inner = 1, x.size, 1
    else:
        axis %= x.ndim
        outer, length = math.prod(x.shape[:axis]), x.shape[axis]
        inner = math.prod(x.shape[axis + 1 :])
    y = t.result(node)
    absent = ref(None)
    args = fill(
        h.Take(), x=ref(x), y=ref(y), scales=absent, biases=absent, indices=ref(indices),
        outer=outer, length=length, inner=inner, count=indices.size, mode=h.DENSE,
    )  # fmt: skip
    t.step(h.TAKE, args, [x, indices], [y], node)


def _indices(t: Translator, node: Node) -> Array:
    value = node.args["indices"]
    if not isinstance(value, Value):
        raise Unknown("an index that is a number")
    indices = t.contiguous(value, node)
    if not mx.issubdtype(indices.dtype, mx.integer):
        raise Unknown("indices that are no integers")
    return indices


def take_packed(t: Translator, pattern: TakenRows) -> None:
    """Rows taken from each part of a packed weight, of which only they are decoded."""
    node, rows = pattern.node, pattern.rows
    parts = [t.contiguous(row.operand("a"), node) for row in rows]
    decode(t, node, parts, _indices(t, rows[0]), *rows)


def decode(t: Translator, node: Node, parts: list[Array], indices: Array, *more: Node) -> None:
    """Rows of a packed weight, by number."""
    if not is_plain_dequantize(node):
        raise Unknown("dequantize to another dtype or by a global scale")
    mode, bits, group = packing(node)
    y = t.result(node)
    inner = y.shape[-1]
    args = fill(
        h.Take(), x=ref(parts[0]), y=ref(y), scales=ref(parts[1]),
        biases=ref(parts[2] if len(parts) > 2 else None), indices=ref(indices), outer=1,
        length=parts[1].size * group // inner, inner=inner, count=indices.size,
        mode=MODES[mode], bits=bits, group=group,
    )  # fmt: skip
    t.step(h.TAKE, args, [*parts, indices], [y], node, *more)


PATTERNS[TakenRows] = take_packed


@kind("take_along_axis")
def take_along_axis(t: Translator, node: Node) -> None:
    x, indices = t.array(node.operand("a")), t.array(node.operand("indices"))
    axis = setting(node, "axis")
    y = t.result(node)
    if axis is None or not mx.issubdtype(indices.dtype, mx.integer):
        raise Unknown("take_along_axis of all axes")
    axis %= x.ndim
    wide = x.broadcast([x.shape[a] if a == axis else y.shape[a] for a in range(x.ndim)])
    args = along_with_indices(indices.broadcast(y.shape), axis, wide, y)
    t.step(h.TAKE_ALONG, args, [x, indices], [y], node)


def along_with_indices(picks: Array, axis: int, x: Array, y: Array) -> Any:
    """A `qg_take_along` of as many elements as there are picks."""
    outer = [a for a in range(y.ndim) if a != axis]
    rows = fill(
        h.Rows(), x=ref(x), y=ref(y), rank=len(outer), shape=[picks.shape[a] for a in outer],
        x_strides=[x.strides[a] for a in outer], y_strides=[y.strides[a] for a in outer],
        length=picks.shape[axis], x_axis=x.strides[axis], y_axis=y.strides[axis],
    )  # fmt: skip
    return fill(
        h.TakeAlong(), rows=rows, indices=ref(picks),
        index_strides=[picks.strides[a] for a in outer], index_axis=picks.strides[axis],
        x_length=x.shape[axis], y_length=y.shape[axis],
    )  # fmt: skip


@kind("concatenate", "stack")
def concatenate(t: Translator, node: Node) -> None:
    y = t.result(node)
    axis = setting(node, "axis")
    if axis is None:
        flat = [t.contiguous(v, node).reshaped((v.type.size,)) for v in node.inputs]
        parts = [part for part in flat if part is not None]
        axis = 0
    else:
        parts = [t.array(v) for v in node.inputs]
        axis %= y.ndim
    if any(p.dtype != y.dtype for p in parts):
        raise Unknown("joined values of several dtypes")
    start = 0
    for part in parts:
        if node.op == "stack":
            goal = y.sliced(axis, start, 1).without(axis)
            start += 1
        else:
            goal = y.sliced(axis, start, part.shape[axis])
            start += part.shape[axis]
        t.copy(part, goal, node)


def starts(t: Translator, node: Node, of: Array, sizes: tuple[int, ...]) -> tuple[Any, list[Array]]:
    """`qg_start`s by axis of a node with `start_indices`, and what they read."""
    value = node.args["start_indices"]
    axes = [a % of.ndim for a in node.args["axes"]]
    if not isinstance(value, Value):
        raise Unknown("starts that are numbers")
    at = t.contiguous(value, node)
    if not mx.issubdtype(at.dtype, mx.integer):
        raise Unknown("starts that are no integers")
    found = {
        axis: h.Start(ref(at.moved(i)), of.strides[axis], of.shape[axis] - sizes[axis])
        for i, axis in enumerate(axes)
    }
    return found, [at]


@kind("slice")
def slice_(t: Translator, node: Node) -> None:
    x = t.array(node.operand("a"))
    y = t.result(node)
    found, reads = starts(t, node, x, y.shape)
    window = Array(x.buffer, x.dtype, y.shape, x.strides, x.offset)
    t.copy(window, y, node, reads=reads, source_starts=found)


@kind("slice_update")
def slice_update(t: Translator, node: Node) -> None:
    update = t.array(node.operand("update"))
    if update.dtype != node.output.dtype:
        raise Unknown("an update of another dtype")
    y = t.own(node.operand("a"), node)
    t.places[node.output] = y
    found, reads = starts(t, node, y, update.shape)
    window = Array(y.buffer, y.dtype, update.shape, y.strides, y.offset)
    t.copy(update, window, node, reads=[y, *reads], goal_starts=found)


@kind("dequantize")
def dequantize(t: Translator, node: Node) -> None:
    """All rows of a packed weight, as if each were taken."""
    values = [node.value(name) for name in ("w", "scales", "biases")]
    parts = [t.contiguous(v, node) for v in values if v is not None]
    rows = node.output.type.size // max(1, node.output.shape[-1])
    every = t.computed((rows,), mx.int32, lambda chain: chain.add(h.OP_IOTA, mx.int32, ()))
    decode(t, node, parts, every)


@kind("as_strided")
def as_strided(t: Translator, node: Node) -> None:
    x = t.contiguous(node.operand("a"), node)
    shape = node.output.shape
    given = node.args.get("strides")
    strides = row_major(shape) if given is None else tuple(int(s) for s in given)
    moved = replace(x.moved(int(setting(node, "offset"))), shape=shape, strides=strides)
    reach = [step * (n - 1) for step, n in zip(strides, shape, strict=True)]
    first, last = (int(setting(node, "offset")) + sum(f(0, r) for r in reach) for f in (min, max))
    if moved.size and not 0 <= first <= last < x.size:
        raise Unknown("strides that lead out of the array")
    t.places[node.output] = moved


@kind("from_fp8")
def from_fp8(t: Translator, node: Node) -> None:
    """Each byte is looked up in a table of all."""
    x, y = t.contiguous(node.operand("x"), node), t.result(node)
    table = t.table.fixed(mx.from_fp8(mx.arange(256).astype(mx.uint8), dtype=y.dtype))
    absent = ref(None)
    args = fill(
        h.Take(), x=ref(table), y=ref(y), scales=absent, biases=absent, indices=ref(x), outer=1,
        length=256, inner=1, count=x.size, mode=h.DENSE,
    )  # fmt: skip
    t.step(h.TAKE, args, [table, x], [y], node)


@kind("zeros", "ones", "full", "zeros_like", "ones_like")
def full(t: Translator, node: Node) -> None:
    out = node.output
    number: float = float(node.op.startswith("ones"))
    if node.op == "full":
        value = node.args["vals"]
        if isinstance(value, Value):
            raise Unknown("full of an array")
        number = value
    t.places[out] = t.filled(number, out.dtype).broadcast(out.shape)


@kind("random.split")
def random_split(t: Translator, node: Node) -> None:
    keys = t.contiguous(node.operand("key"), node)
    y = t.result(node)
    args = h.Random(ref(keys), ref(y), 1, y.size)
    t.step(h.RANDOM, args, [keys], [y], node)


@kind("pad")
def pad(t: Translator, node: Node) -> None:
    x, out = t.array(node.operand("a")), node.output
    widths = setting(node, "pad_width")
    if setting(node, "mode") != "constant" or isinstance(setting(node, "constant_values"), Value):
        raise Unknown("padding that is no number")
    pairs = _pairs(widths, x.ndim)
    y = t.filled(float(setting(node, "constant_values")), out.dtype, out.shape)
    t.places[out] = y
    window = y
    for axis, (before, _) in enumerate(pairs):
        window = window.sliced(axis, before, x.shape[axis])
    t.copy(x, window, node, reads=[y])


def _pairs(widths: Any, ndim: int) -> list[tuple[int, int]]:
    """What is added before and after each axis, as `mx.pad` reads it."""
    if isinstance(widths, int):
        return [(widths, widths)] * ndim
    if len(widths) in (1, 2) and all(isinstance(w, int) for w in widths):
        return [(widths[0], widths[-1])] * ndim
    pairs = [(w, w) if isinstance(w, int) else (w[0], w[-1]) for w in widths]
    if len(pairs) != ndim:
        raise Unknown("padding of another number of axes")
    return pairs


@kind("arange")
def arange(t: Translator, node: Node) -> None:
    out = node.output
    start, stop, step = (node.args.get(name) for name in ("start", "stop", "step"))
    if any(isinstance(v, Value) for v in (start, stop, step)):
        raise Unknown("arange of arrays")
    chain = Chain(out.shape, 0)
    number = chain.add(h.OP_IOTA, out.dtype, ())
    step = 1 if step is None else step
    if step != 1:
        number = chain.add(h.OP_MULTIPLY, out.dtype, (number, chain.constant(step, out.dtype)))
    first = 0 if stop is None else start or 0
    if first:
        number = chain.add(h.OP_ADD, out.dtype, (number, chain.constant(first, out.dtype)))
    y = t.result(node)
    chain.outputs.append((y, number))
    y.buffer.ready = 0
    t.work.append(t.chain_step(chain))
