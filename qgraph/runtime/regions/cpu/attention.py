"""Attention and rotations."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from ....ir.graph import Node, Value
from ....ir.ops import setting
from ..arrays import Array
from ..unknown import Unknown
from .refs import FLOATS, fill, h, padded, ref
from .translate import Translator, kind
from .views import VIEWS


@kind("fast.scaled_dot_product_attention", "decode_attention")
def attention(t: Translator, node: Node) -> None:
    args, reads = attention_args(t, node)
    y = _result(t, node)
    fill(args, y=ref(y), y_strides=y.strides)
    t.step(h.ATTENTION, args, reads, [y], node)


def _result(t: Translator, node: Node) -> Array:
    """Where the result is to lie: heads side by side if they are read so."""
    value = node.output
    readers = t.body.users.get(value, ())
    if not any(reader.op in VIEWS and _swaps_heads(reader) for reader in readers):
        return t.result(node)
    batch, heads, queries, dim = value.shape
    y = t.table.array((batch, queries, heads, dim), value.dtype).transposed((0, 2, 1, 3))
    t.places[value] = y
    return y


def _swaps_heads(node: Node) -> bool:
    if node.op == "swapaxes":
        return {setting(node, "axis1") % 4, setting(node, "axis2") % 4} == {1, 2}
    return node.op == "transpose" and tuple(setting(node, "axes") or ()) == (0, 2, 1, 3)


def attention_args(t: Translator, node: Node) -> tuple[Any, list[Array]]:
    """A `qg_attention` without its result."""
    q, k, v = (t.array(node.operand(name)) for name in "qkv")
    if not {q.dtype, k.dtype, v.dtype} <= FLOATS:
        raise Unknown("attention of integers")
    absent = ref(None)
    batch, heads, queries, dim = q.shape
    args = fill(
        h.Attention(), q=ref(q), k=ref(k), v=ref(v), batch=batch, heads=heads,
        kv_heads=k.shape[1], queries=queries, keys=k.shape[2], dim=dim, value_dim=v.shape[-1],
        q_strides=q.strides, k_strides=k.strides, v_strides=v.strides,
        scale=setting(node, "scale"), last=absent, first=absent, mask=absent, sinks=absent,
    )  # fmt: skip
    reads = [q, k, v]
    if node.op == "decode_attention":
        args.window = node.args.get("window", 0)
        for name in ("last", "first"):
            if node.args.get(name) is not None:
                position = t.contiguous(node.operand(name), node)
                fill(args, **{name: ref(position), f"{name}_batch": int(position.size > 1)})
                reads.append(position)
    mask = node.args.get("mask")
    if isinstance(mask, str):
        args.causal = 1
    elif mask is not None:
        reads.append(_masked(t, args, mask, node))
    if node.value("sinks") is not None:
        sinks = t.contiguous(node.operand("sinks"), node)
        args.sinks = ref(sinks)
        reads.append(sinks)
    return args, reads


def _masked(t: Translator, args: Any, mask: Value, node: Node) -> Array:
    array, q = t.array(mask), node.operand("q")
    shape = (*q.shape[:-1], node.operand("k").shape[2])
    if array.dtype != mx.bool_ and array.dtype not in FLOATS:
        array = t.cast(array, q.dtype, node)  # it is added, as MLX adds it
    fill(args, mask=ref(array), mask_strides=array.broadcast(shape).strides)
    return array


@kind("fast.rope")
def rope(t: Translator, node: Node) -> None:
    x = t.array(node.operand("a"))
    if x.dtype not in FLOATS:
        raise Unknown("a rotation of integers")
    if x.ndim < 3:
        raise Unknown("a rotation of fewer than three axes")
    if x.ndim != 4:
        shape = (x.shape[0], math.prod(x.shape[1:-2]), *x.shape[-2:])
        x = x.reshaped(shape) or _reshaped(t, x, shape, node)
    y = t.result(node)
    flat = y.reshaped(x.shape)
    assert flat is not None
    absent, base = ref(None), setting(node, "base")
    args = fill(
        h.Rope(), x=ref(x), y=ref(y), freqs=absent, offset=absent,
        batch=x.shape[0], heads=x.shape[1], length=x.shape[2], dim=x.shape[3],
        dims=setting(node, "dims"), traditional=int(setting(node, "traditional")),
        x_strides=x.strides, y_strides=padded(flat.strides), base=0.0 if base is None else base,
        scale=setting(node, "scale"),
    )  # fmt: skip
    reads = [x]
    offset = setting(node, "offset")
    if isinstance(offset, Value):
        at = t.contiguous(offset, node)
        if at.size not in (1, x.shape[0]):
            raise Unknown("offsets that are not one a batch")
        fill(args, offset=ref(at), offset_batch=int(at.size > 1))
        reads.append(at)
    else:
        args.start = int(offset)
    if node.value("freqs") is not None:
        freqs = t.contiguous(node.operand("freqs"), node)
        if freqs.dtype != mx.float32:
            raise Unknown("frequencies of half precision")
        args.freqs = ref(freqs)
        reads.append(freqs)
    t.step(h.ROPE, args, reads, [y], node)


def _reshaped(t: Translator, x: Array, shape: tuple[int, ...], node: Node) -> Array:
    made = t.copied(x, node).reshaped(shape)
    assert made is not None
    return made
