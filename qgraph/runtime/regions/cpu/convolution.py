"""Convolutions: patches as a strided view, multiplied by the weight as it lies.

MLX keeps channels last and a weight as (outputs, *kernel, channels): a row of patches times a row
of the weight is one sum.  A convolution of each channel by itself is a chain of shifted views.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ....ir.graph import Node
from ....ir.ops import setting
from ..arrays import Array
from ..unknown import Unknown
from .chains import Chain
from .products import dense_weight, plain_product
from .refs import FLOATS, fill, h, ref
from .translate import Translator, kind

MOST_TAPS = 16
"""Elements of a kernel up to which channels by themselves are a chain."""


@kind("conv_general")
def convolution(t: Translator, node: Node) -> None:
    x, w = t.array(node.operand("input")), t.array(node.operand("weight"))
    out = node.output
    if not {x.dtype, w.dtype, out.dtype} <= FLOATS or x.dtype != out.dtype:
        raise Unknown("a convolution of integers or of several dtypes")
    axes = x.ndim - 2
    groups, kernel = int(setting(node, "groups")), w.shape[1:-1]
    if setting(node, "flip"):
        for axis in range(1, axes + 1):
            w = w.sliced(axis, w.shape[axis] - 1, w.shape[axis], -1)
    x = _padded(t, node, x)
    strides = _each(setting(node, "stride"), axes)
    dilation = _each(setting(node, "kernel_dilation"), axes)
    inner = x.strides[1:-1]
    patches = Array(
        x.buffer, x.dtype, (out.shape[0], *out.shape[1:-1], *kernel, x.shape[-1]),
        (x.strides[0], *(s * n for s, n in zip(inner, strides, strict=True)),
         *(s * n for s, n in zip(inner, dilation, strict=True)), x.strides[-1]), x.offset,
    )  # fmt: skip
    alone = groups == x.shape[-1] == w.shape[0] and math.prod(kernel) <= MOST_TAPS
    if alone:
        _by_channel(t, node, patches, w)
    else:
        _product(t, node, patches, w, groups)


def _each(given: Any, axes: int) -> Sequence[int]:
    return [int(n) for n in given] if isinstance(given, tuple | list) else [int(given)] * axes


def _padded(t: Translator, node: Node, x: Array) -> Array:
    """x with zeros around, and between its elements where it is dilated."""
    axes, given = x.ndim - 2, setting(node, "padding")
    low, high = (
        given if isinstance(given, tuple) and isinstance(given[0], tuple) else (given, given)
    )
    before, after = _each(low, axes), _each(high, axes)
    dilation = _each(setting(node, "input_dilation"), axes)
    if min((*before, *after), default=0) < 0:
        raise Unknown("padding that cuts off")
    if not any((*before, *after)) and set(dilation) <= {1}:
        return x
    parts = zip(x.shape[1:-1], before, after, dilation, strict=True)
    shape = [(n - 1) * step + 1 + lo + hi for n, lo, hi, step in parts]
    window = whole = t.filled(0, x.dtype, (x.shape[0], *shape, x.shape[-1]))
    for i in range(axes):
        window = window.sliced(i + 1, before[i], x.shape[i + 1], dilation[i])
    t.copy(x, window, node, reads=[whole])
    return whole


def _product(t: Translator, node: Node, patches: Array, w: Array, groups: int) -> None:
    """Patches row by row, by the weight's rows; for each group of channels by itself."""
    outputs, deep = w.shape[0] // groups, math.prod(w.shape[1:])
    last = patches.ndim - 1
    if groups > 1:
        shape = (*patches.shape[:-1], groups, patches.shape[-1] // groups)
        split = patches.reshaped(shape)
        if split is None:
            raise Unknown("groups of channels that do not follow one another")
        patches = split.transposed([last, *range(last), last + 1])
    rows = math.prod(node.output.shape[:-1])
    wanted = (groups, rows, deep) if groups > 1 else (rows, deep)
    x = patches.reshaped(wanted)
    if x is None or (groups == 1 and x.strides[-1] != 1):
        x = t.copied(patches, node).reshaped(wanted)
    assert x is not None
    w = t.contiguous(w, node)
    y = t.result(node)
    args = fill(
        plain_product(x.sliced(0, 0, 1).without(0) if groups > 1 else x, outputs, deep),
        mode=h.DENSE, w=dense_weight(w), w_row=deep, w_column=1, y=ref(y), y_row=y.shape[-1],
        y_column=1,
    )  # fmt: skip
    if groups > 1:
        fill(args, batch_rank=1, batch=[groups], x_batch=[x.strides[0]], w_batch=[outputs * deep],
             y_batch=[outputs])  # fmt: skip
    t.step(h.MATMUL, args, [x, w], [y], node)


def _by_channel(t: Translator, node: Node, patches: Array, w: Array) -> None:
    """Shifted views times a number for each channel, added up in float32."""
    out = node.output
    taps = w.transposed([*range(1, w.ndim), 0]).without(w.ndim - 2)

    def make(chain: Chain) -> int:
        def wide(array: Array) -> int:
            number = chain.read(array)
            wanted = array.dtype == mx.float32
            return number if wanted else chain.add(h.OP_CAST, mx.float32, (number,))

        places = itertools.product(*map(range, w.shape[1:-1]))
        pairs = [(wide(_at(patches, place)), wide(_at(taps, place))) for place in places]
        total = chain.add(h.OP_MULTIPLY, mx.float32, pairs[0])
        for pair in pairs[1:]:
            total = chain.add(h.OP_FMA, mx.float32, (*pair, total))
        if out.dtype != mx.float32:
            total = chain.add(h.OP_CAST, out.dtype, (total,))
        return total

    t.places[out] = t.computed(out.shape, out.dtype, make, patches, w)


def _at(array: Array, place: Sequence[int]) -> Array:
    """Of an array (…, *kernel, channels) what belongs to one element of the kernel."""
    for n in reversed(place):
        axis = array.ndim - 2
        array = array.sliced(axis, n, 1).without(axis)
    return array
