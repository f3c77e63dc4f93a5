"""Norms, softmax, reductions and what else works along an axis."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ....ir.graph import Node
from ....ir.ops import setting
from ..arrays import Array
from ..unknown import Unknown
from .refs import FLOATS, fill, h, ref
from .translate import Translator, kind


@kind("fast.rms_norm", "fast.layer_norm")
def norm(t: Translator, node: Node) -> None:
    x = t.array(node.operand("x"))
    if x.dtype not in FLOATS or not x.shape[-1]:
        raise Unknown("a norm of integers")
    rows = x.rows()
    if rows is None:
        x = t.copied(x, node)
        rows = x.rows()
    assert rows is not None
    y = t.result(node)
    parts = {
        name: None if node.value(name) is None else t.contiguous(node.operand(name), node)
        for name in ("weight", "bias")
    }
    args = fill(
        h.Norm(), x=ref(x), y=ref(y), weight=ref(parts["weight"]), bias=ref(parts["bias"]),
        layer=int(node.op == "fast.layer_norm"), rows=rows[0], columns=x.shape[-1],
        x_row=rows[1], x_column=x.strides[-1], y_row=x.shape[-1], y_column=1,
        eps=setting(node, "eps"),
    )  # fmt: skip
    t.step(h.NORM, args, [x, *parts.values()], [y], node)


def along(x: Array, y: Array, axis: int) -> Any:
    """`qg_rows` of two arrays of one shape."""
    outer = [a for a in range(x.ndim) if a != axis]
    return fill(
        h.Rows(), x=ref(x), y=ref(y), rank=len(outer), shape=[x.shape[a] for a in outer],
        x_strides=[x.strides[a] for a in outer], y_strides=[y.strides[a] for a in outer],
        length=x.shape[axis], x_axis=x.strides[axis], y_axis=y.strides[axis],
    )  # fmt: skip


def axes_of(node: Node, ndim: int) -> list[int]:
    axes = setting(node, "axis")
    if axes is None:
        return list(range(ndim))
    return sorted(a % ndim for a in (axes if isinstance(axes, tuple) else (axes,)))


@kind("softmax")
def softmax(t: Translator, node: Node) -> None:
    x = t.array(node.operand("a"))
    if x.dtype not in FLOATS:
        raise Unknown("softmax of integers")
    axes = axes_of(node, x.ndim)
    y = t.result(node)
    if len(axes) == 1:
        t.step(h.SOFTMAX, h.Softmax(along(x, y, axes[0])), [x], [y], node)
        return
    order = [a for a in range(x.ndim) if a not in axes] + axes
    x = t.contiguous(x.transposed(order), node)
    length = math.prod(node.output.shape[a] for a in axes)
    made = t.table.array((x.size // max(1, length), length), x.dtype)
    flat = x.reshaped(made.shape)
    assert flat is not None
    t.step(h.SOFTMAX, h.Softmax(along(flat, made, 1)), [x], [made], node)
    turned = made.reshaped(x.shape)
    assert turned is not None
    t.places[node.output] = turned.transposed([order.index(a) for a in range(x.ndim)])


_REDUCTIONS = {
    name: getattr(h, name.upper())
    for name in ("sum", "mean", "prod", "max", "min", "all", "any", "argmax", "argmin",
                 "logsumexp", "var")
}  # fmt: skip
_OF_FLOATS = frozenset({"mean", "logsumexp", "var"})
_IN_PARTS = frozenset({"sum", "mean", "prod", "max", "min", "all", "any"})
FEW = 32
"""Results from which on each is the work of one task; the elements of fewer are split."""


@kind(*_REDUCTIONS)
def reduce(t: Translator, node: Node) -> None:
    x, dtype = t.array(node.operand("a")), node.output.dtype
    if node.op in _OF_FLOATS and x.dtype != dtype:
        whole = x
        x = t.computed(x.shape, dtype, lambda c: c.add(h.OP_CAST, dtype, (c.read(whole),)), whole)
    inner = axes_of(node, x.ndim)
    outer = [a for a in range(x.ndim) if a not in inner]
    y = t.result(node)
    bare = y.reshaped([x.shape[a] for a in outer])
    assert bare is not None
    results = math.prod(bare.shape)
    if node.op in _IN_PARTS and results < FEW and x.size >= 1 << 16:
        axis = max(inner, key=lambda a: x.shape[a])
        parts = _parts(x.shape[axis])
        length = x.shape[axis] // parts
        shape, strides = list(x.shape), list(x.strides)
        shape[axis : axis + 1] = parts, length
        strides[axis : axis + 1] = strides[axis] * length, strides[axis]
        split = replace(x, shape=tuple(shape), strides=tuple(strides))
        moved = [a + (a > axis) for a in outer] + [axis]
        between = mx.float32 if dtype in FLOATS else dtype
        made = t.table.array((*bare.shape, parts), between)
        rest = [a for a in range(split.ndim) if a not in moved]
        _reduced(t, node, split, moved, rest, made)
        x, outer, inner = made, list(range(made.ndim - 1)), [made.ndim - 1]
    _reduced(t, node, x, outer, inner, bare)


def _parts(length: int) -> int:
    """Into how many equal parts, up to 32, a length can be split."""
    return max(n for n in range(1, 33) if length % n == 0)


def _reduced(
    t: Translator, node: Node, x: Array, outer: list[int], inner: list[int], y: Array
) -> None:
    args = fill(
        h.Reduce(), x=ref(x), y=ref(y), op=_REDUCTIONS[node.op], outer_rank=len(outer),
        inner_rank=len(inner), outer=[x.shape[a] for a in outer],
        x_outer=[x.strides[a] for a in outer], y_outer=list(y.strides),
        inner=[x.shape[a] for a in inner], x_inner=[x.strides[a] for a in inner],
    )  # fmt: skip
    if node.op == "var":
        args.ddof = float(setting(node, "ddof"))
    t.step(h.REDUCE, args, [x], [y], node)


@kind("sort", "argsort", "argpartition", "partition")
def sort(t: Translator, node: Node) -> None:
    """In order, or with one element in its place and the others on their sides of it."""
    x = t.array(node.operand("a"))
    axis = setting(node, "axis")
    y = t.result(node)
    if axis is None:
        x, axis = _flat(t, x, node), 0
    args = h.Sort(along(x, y, axis % x.ndim), int(node.op.startswith("arg")), 0)
    if "partition" in node.op:
        args.part, args.at = 1, setting(node, "kth") % max(1, x.shape[axis])
    t.step(h.SORT, args, [x], [y], node)


def _flat(t: Translator, x: Array, node: Node) -> Array:
    made = t.contiguous(x, node).reshaped((x.size,))
    assert made is not None
    return made


_SCANS = {"cumsum": h.SUM, "cumprod": h.PROD, "cummax": h.MAX, "cummin": h.MIN,
          "logcumsumexp": h.LOGSUMEXP}  # fmt: skip


@kind(*_SCANS)
def scan(t: Translator, node: Node) -> None:
    x = t.array(node.operand("a"))
    axis = setting(node, "axis")
    if (x.dtype in FLOATS) != (node.output.dtype in FLOATS):
        raise Unknown(f"{node.op} from {x.dtype}".replace("mlx.core.", ""))
    if axis is None:
        x, axis = _flat(t, x, node), 0
    y = t.result(node)
    args = h.Scan(along(x, y, axis % x.ndim), _SCANS[node.op], int(setting(node, "reverse")),
                  int(not setting(node, "inclusive")))  # fmt: skip
    t.step(h.SCAN, args, [x], [y], node)
