"""Which packed weight stands behind the operand of a product.

An operand may be a `dequantize` seen through transposes, reshapes, broadcasts and casts.  Those
views are replayed by NumPy on an array that has the weight's strides but no memory, and the
strides that come out say whether whole groups lie along one axis, and along which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.analysis.changes import behind_views
from qgraph.ir.graph import Node, Value
from qgraph.ir.ops import setting
from qgraph.tracing.tensor import Tensor, apply

from .indexing import index_of, is_whole
from .products import parts_of

Strided = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class WeightView:
    """A view of a packed weight: `rows` in front, and the axis along which groups run.

    Attributes:
        source: the `dequantize`.
        view: an array without memory, with the shape and element strides of the operand.
        dtype: of the operand, after casts.
        factors: ops and numbers that scale all of the weight, `("multiply", 0.5)`; they scale the
            product as well.
    """

    source: Node
    view: Strided
    dtype: mx.Dtype
    factors: tuple[tuple[str, Value], ...] = ()


def resolve(value: Value) -> WeightView | str | None:
    """The weight that `value` is a view of; None if there is none, or why it cannot be used."""
    chain: list[Node] = []
    factors: list[tuple[str, Value]] = []
    node = value.node
    while True:
        if (node.op in _VIEWS or node.op in _SAME) and node.inputs:
            chain.append(node)
            node = node.inputs[0].node
        elif (scaled := _scaled(node)) is not None:
            factors.insert(0, (node.op, scaled[1]))
            node = scaled[0].node
        else:
            break
    if node.op in _ARITHMETIC and any(behind_views(v).node.op == "dequantize" for v in node.inputs):
        return f"{node.op} stands between dequantize and the product; {_ARITHMETIC[node.op]}"
    if node.op != "dequantize":
        return None
    for step in chain:
        if not mx.issubdtype(step.output.dtype, mx.floating):
            return (
                f"a cast to {step.output.dtype} between dequantize and the product rounds the "
                "weight; cast to a float dtype, or not at all".replace("mlx.core.", "")
            )
    if node.value("global_scale") is not None:
        return "quantized products take no global scale; multiply the result by it instead"
    shape = node.output.shape
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    view: Strided = np.lib.stride_tricks.as_strided(np.empty(1, np.uint8), shape, strides)
    try:
        for step in reversed(chain):
            if step.op in _VIEWS:
                view = _VIEWS[step.op](view, step)
    except (ValueError, IndexError):
        return (
            f"{step.op} between dequantize and the product is no view of whole rows; "
            "index or reshape the packed weight instead"
        )
    return WeightView(node, view, value.dtype, tuple(factors))


def _scaled(node: Node) -> tuple[Value, Value] | None:
    """What is scaled, and the number without axes by which it is."""
    if node.op not in ("multiply", "divide"):
        return None
    a, b = node.operand("a"), node.operand("b")
    if b.ndim == 0 < a.ndim:
        return a, b
    return (b, a) if node.op == "multiply" and a.ndim == 0 < b.ndim else None


def _index(view: Strided, node: Node) -> Strided:
    if not is_whole(node):
        raise ValueError("not a view of the whole weight")
    result: Strided = view[index_of(node)]
    return result


def _reshape(view: Strided, node: Node) -> Strided:
    return view.reshape(node.output.shape, copy=False)


TRANSPOSES: dict[str, Callable[[Strided, Node], Strided]] = {
    "transpose": lambda v, n: v.transpose(setting(n, "axes")),
    "matrix_transpose": lambda v, n: v.swapaxes(-1, -2),
    "swapaxes": lambda v, n: v.swapaxes(n.args["axis1"], n.args["axis2"]),
    "moveaxis": lambda v, n: np.moveaxis(v, n.args["source"], n.args["destination"]),
}
"""Ops that put axes in another order, on NumPy's arrays."""

_VIEWS: dict[str, Callable[[Strided, Node], Strided]] = {
    **TRANSPOSES,
    "broadcast_to": lambda v, n: np.broadcast_to(v, n.output.shape),
    "expand_dims": _reshape,
    "squeeze": _reshape,
    "reshape": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "getitem": _index,
}
_SCALE = "scale x, the result or the packed scales instead"
_ADD = "multiply by each of the terms and add the products instead"
_ARITHMETIC = {
    "multiply": _SCALE, "divide": _SCALE, "negative": _SCALE, "add": _ADD, "subtract": _ADD
}  # fmt: skip
_SAME = frozenset({"astype", "contiguous", "stop_gradient", "positive"})


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight as a quantized product takes it.

    Attributes:
        parts: w_q, scales and, for affine, biases; two axes, or batches of that.
        transpose: groups run along the axis that is summed.
        settings: group_size, bits and mode.
        factors: what the product is to be scaled by, as in `WeightView`.
    """

    parts: tuple[Tensor, ...]
    transpose: bool
    settings: dict[str, Any]
    factors: tuple[tuple[str, Value], ...] = ()

    def scaled(self, product: Tensor) -> Tensor:
        """The product with the factors of the weight."""
        for op, factor in self.factors:
            product = apply(op, (product, Tensor(factor)))
        return product


def as_operand(found: WeightView) -> Packed | str:
    """The packed weight for an operand on the right, (..., K, N), or why there is none."""
    view, source = found.view, found.source
    columns = source.output.shape[-1]
    if view.ndim < 2:
        return "the weight has one axis here; give it two"
    summed, kept = _axis_of_groups(view, -2, columns), _axis_of_groups(view, -1, columns)
    if not (summed or kept):
        return (
            "groups do not run whole along one of the last two axes; "
            "keep each row of the packed weight together when reshaping"
        )
    transpose = summed
    row_axis = view.ndim - (1 if transpose else 2)
    dims = [
        (size, stride // columns) for size, stride in zip(view.shape, view.strides, strict=True)
    ]
    order = [*range(view.ndim - 2), row_axis]
    packed = _rows(source, [dims[i] for i in order])
    if isinstance(packed, str):
        return packed
    settings = {name: source.args[name] for name in ("group_size", "bits")}
    settings["mode"] = setting(source, "mode")
    return Packed(packed, transpose, settings, found.factors)


def _axis_of_groups(view: Strided, axis: int, columns: int) -> bool:
    other = -3 - axis
    whole_rows = view.shape[other] == 1 or view.strides[other] % columns == 0
    return view.shape[axis] == columns and view.strides[axis] == 1 and whole_rows


def _rows(source: Node, dims: Sequence[tuple[int, int]]) -> tuple[Tensor, ...] | str:
    """The packed parts with their rows laid out as `dims`, pairs of size and stride in rows."""
    real = [i for i, (size, stride) in enumerate(dims) if size > 1 and stride > 0]
    spread = [i for i, (size, stride) in enumerate(dims) if size > 1 and stride == 0]
    by_stride = sorted(real, key=lambda i: -dims[i][1])
    sizes = [dims[i][0] for i in by_stride]
    if [dims[i][1] for i in by_stride] != [prod(sizes[i + 1 :]) for i in range(len(sizes))]:
        return "the rows of the weight overlap or are not all used; index the packed rows instead"
    if spread and spread[-1] == len(dims) - 1:
        return "one row of the weight is broadcast over the outputs; multiply by that row alone"
    if prod(sizes) != prod(source.output.shape[:-1]):
        return "not all rows of the weight are used; slice the packed weight instead"
    # Broadcast batches need no copies of the weight: the product broadcasts x instead.
    plain = [i for i in real if i < len(dims) - 1] == []
    final = [dims[-1][0]] if plain else [1 if i in spread else s for i, (s, _) in enumerate(dims)]
    axes = [by_stride.index(i) for i in real]
    return tuple(_lay_out(part, sizes, axes, final) for part in parts_of(source))


def _lay_out(part: Tensor, sizes: list[int], axes: list[int], final: list[int]) -> Tensor:
    last = part.shape[-1]
    if axes != sorted(axes):
        part = apply("reshape", (part, (*sizes, last)))
        part = apply("transpose", (part, (*axes, len(axes))))
    if part.shape != (*final, last):
        part = apply("reshape", (part, (*final, last)))
    return part
