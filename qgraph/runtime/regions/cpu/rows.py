"""Norms, softmax, reductions and what else works along an axis."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ....ir.graph import Node
from ....ir.ops import setting
from ..arrays import Array
from .refs import FLOATS, Unknown, fill, h, ref
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
    if len(axes) != 1:
        if axes != list(range(x.ndim)):
            raise Unknown("softmax along several axes")
        x = t.contiguous(x, node)
        flat, whole = x.reshaped((x.size,)), y.reshaped((x.size,))
        assert flat is not None
        assert whole is not None
        args = h.Softmax(along(flat, whole, 0))
    else:
        args = h.Softmax(along(x, y, axes[0]))
    t.step(h.SOFTMAX, args, [x], [y], node)


_REDUCTIONS = {
    name: getattr(h, name.upper())
    for name in ("sum", "mean", "prod", "max", "min", "all", "any", "argmax", "argmin",
                 "logsumexp", "var")
}  # fmt: skip
_FLOATS_ONLY = frozenset({"sum", "mean", "prod", "logsumexp", "var"})


@kind(*_REDUCTIONS)
def reduce(t: Translator, node: Node) -> None:
    x = t.array(node.operand("a"))
    if node.op in _FLOATS_ONLY and not (x.dtype in FLOATS and node.output.dtype == x.dtype):
        raise Unknown(f"{node.op} of integers")
    if node.op in ("all", "any") and x.dtype != mx.bool_:
        raise Unknown(f"{node.op} of numbers")
    if node.op in ("max", "min") and x.dtype == mx.bool_:
        raise Unknown(f"{node.op} of booleans")
    inner = axes_of(node, x.ndim)
    outer = [a for a in range(x.ndim) if a not in inner]
    y = t.result(node)
    bare = y.reshaped([x.shape[a] for a in outer])
    assert bare is not None
    args = fill(
        h.Reduce(), x=ref(x), y=ref(y), op=_REDUCTIONS[node.op], outer_rank=len(outer),
        inner_rank=len(inner), outer=[x.shape[a] for a in outer],
        x_outer=[x.strides[a] for a in outer], y_outer=list(bare.strides),
        inner=[x.shape[a] for a in inner], x_inner=[x.strides[a] for a in inner],
    )  # fmt: skip
    if node.op == "var":
        args.ddof = float(setting(node, "ddof"))
    t.step(h.REDUCE, args, [x], [y], node)


@kind("sort", "argsort", "argpartition", "partition")
def sort(t: Translator, node: Node) -> None:
    """In order; what a partition leaves open is sorted too."""
    x = t.array(node.operand("a"))
    axis = setting(node, "axis")
    if axis is None or x.dtype == mx.bool_:
        raise Unknown(f"{node.op} of all axes, or of booleans")
    if "partition" in node.op and x.shape[axis] > MOST_SORTED:
        raise Unknown(f"a partition of more than {MOST_SORTED} elements")
    y = t.result(node)
    rows = along(x, y, axis % x.ndim)
    t.step(h.SORT, h.Sort(rows, int(node.op.startswith("arg")), 0), [x], [y], node)


MOST_SORTED = 1024
"""Elements of which a part is found by sorting all: experts, not tokens."""

_SCANS = {"cumsum": h.SUM, "cumprod": h.PROD, "cummax": h.MAX, "cummin": h.MIN,
          "logcumsumexp": h.LOGSUMEXP}  # fmt: skip


@kind(*_SCANS)
def scan(t: Translator, node: Node) -> None:
    x = t.array(node.operand("a"))
    axis = setting(node, "axis")
    if x.dtype not in FLOATS or node.output.dtype != x.dtype or (axis is None and x.ndim != 1):
        raise Unknown(f"{node.op} of integers or of all axes")
    y = t.result(node)
    rows = along(x, y, 0 if axis is None else axis % x.ndim)
    args = h.Scan(rows, _SCANS[node.op], int(setting(node, "reverse")),
                  int(not setting(node, "inclusive")))  # fmt: skip
    t.step(h.SCAN, args, [x], [y], node)
