"""Products with dense and packed weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ....ir.graph import Node, Value
from ....ir.ops import setting
from ..arrays import Array, merged, row_major
from ..unknown import Unknown
from .patterns import Followed, packing
from .refs import FLOATS, fill, h, ref
from .translate import PATTERNS, Translator, kind

MODES = {"affine": h.AFFINE, "mxfp4": h.MXFP4, "mxfp8": h.MXFP8, "nvfp4": h.NVFP4}


def left_operand(t: Translator, value: Value, node: Node) -> Array:
    """x as rows: (m, k), copied where no one distance leads from row to row."""
    x = t.array(value)
    if x.dtype not in FLOATS:
        raise Unknown(f"products of {x.dtype}".replace("mlx.core.", ""))
    flat = x.reshaped((-(-x.size // x.shape[-1]) if x.shape[-1] else 0, x.shape[-1]))
    if flat is None:
        flat = t.copied(x, node).reshaped((x.size // x.shape[-1], x.shape[-1]))
    assert flat is not None
    return flat


def weight(t: Translator, parts: list[Value | None], node: Node) -> tuple[Any, list[Array]]:
    """A `qg_weight` of packed parts, and the arrays it reads."""
    arrays = [None if p is None else t.contiguous(p, node) for p in parts]
    arrays += [None] * (3 - len(arrays))
    return h.Weight(*map(ref, arrays)), [a for a in arrays if a is not None]


@kind("quantized_matmul")
def quantized_matmul(t: Translator, node: Node) -> None:
    args, reads = quantized_args(t, node)
    _write(t, args, reads, node)


def quantized_args(t: Translator, node: Node) -> tuple[Any, list[Array]]:
    """A `qg_matmul` without its result."""
    mode, bits, group = packing(node)
    parts = [node.value(name) for name in ("w", "scales", "biases")]
    w = node.operand("w")
    if w.ndim != 2:
        raise Unknown("a batch of packed weights")
    before = t.before_rounding.get(node.operand("x"))
    x = left_operand(t, before or node.operand("x"), node)
    packed, reads = weight(t, parts, node)
    columns_first = not setting(node, "transpose")
    wide = w.shape[1] * 32 // bits
    n, k = (wide, w.shape[0]) if columns_first else (w.shape[0], wide)
    args = plain_product(x, n, k)
    fill(args, w=packed, mode=MODES[mode], bits=bits, group=group,
         columns_first=int(columns_first), rounded=int(before is not None))  # fmt: skip
    return args, [x, *reads]


def plain_product(x: Array, n: int, k: int) -> Any:
    absent = ref(None)
    none = h.Weight(absent, absent, absent)
    return fill(
        h.Matmul(),
        x=ref(x), w2=none, bias=absent, times=absent, add=absent, lhs=absent, rhs=absent,
        m=x.shape[0], n=n, k=k, x_row=x.strides[0], x_column=x.strides[1], alpha=1.0,
    )  # fmt: skip


def _write(t: Translator, args: Any, reads: list[Array], last: Node, *nodes: Node) -> Array:
    """The step of a product whose result (…, n) is written row by row."""
    y = t.result(last)
    fill(args, y=ref(y), y_row=y.shape[-1], y_column=1)
    t.step(h.MATMUL, args, reads, [y], *nodes, last)
    return y


def dense_args(t: Translator, node: Node) -> tuple[Any, list[Array]]:
    """A `qg_matmul` by one dense matrix, without its result."""
    x, b = left_operand(t, node.operand("a"), node), t.array(node.operand("b"))
    if node.output.dtype not in FLOATS or b.dtype not in FLOATS:
        raise Unknown("products of integers")
    args = fill(
        plain_product(x, b.shape[-1], b.shape[-2]), mode=h.DENSE, w=dense_weight(b),
        w_row=b.strides[-1], w_column=b.strides[-2],
    )  # fmt: skip
    return args, [x, b]


def dense_weight(b: Array) -> Any:
    return h.Weight(ref(b), ref(None), ref(None))


@kind("matmul", "addmm")
def matmul(t: Translator, node: Node) -> None:
    a, b = node.operand("a"), node.operand("b")
    if a.ndim < 1 or b.ndim < 2:
        raise Unknown("products with vectors")
    lead = node.output.shape[: -1 if a.ndim == 1 else -2]
    args, reads = dense_args(t, node) if b.ndim == 2 else _batch_args(t, node, lead)
    if node.op == "addmm":
        reads += _plus(t, node, args)
    _write(t, args, reads, node)


def _batch_args(t: Translator, node: Node, lead: tuple[int, ...]) -> tuple[Any, list[Array]]:
    """A `qg_matmul` by a matrix for each of a batch."""
    a, b = (t.array(node.operand(name)) for name in "ab")
    if not {a.dtype, b.dtype, node.output.dtype} <= FLOATS:
        raise Unknown("products of integers")
    if a.ndim == 1:
        a = a.broadcast((1, *a.shape))
    (m, k), n = a.shape[-2:], b.shape[-1]
    x, w = a.broadcast((*lead, m, k)), b.broadcast((*lead, k, n))
    y_strides = [size * n * m for size in row_major(lead)]
    shape, (xs, ws, ys) = merged(lead, [x.strides[:-2], w.strides[:-2], y_strides])
    if len(shape) > 4:
        raise Unknown(f"a product over {len(shape)} axes of a batch")
    args = fill(
        plain_product(x, n, k), m=m, x_row=x.strides[-2], x_column=x.strides[-1], mode=h.DENSE,
        w=dense_weight(w), w_row=w.strides[-1], w_column=w.strides[-2], batch_rank=len(shape),
        batch=shape, x_batch=xs, w_batch=ws, y_batch=ys,
    )  # fmt: skip
    return args, [x, w]


@kind("gather_qmm", "gather_mm")
def gathered(t: Translator, node: Node) -> None:
    """Products with matrices picked by index."""
    packed = node.op == "gather_qmm"
    x, w = (t.array(node.operand(name)) for name in (("x", "w") if packed else ("a", "b")))
    if x.dtype not in FLOATS or node.output.dtype not in FLOATS:
        raise Unknown("products of integers")
    m, k = x.shape[-2:]
    lead = node.output.shape[:-2]
    y_strides = [size * node.output.shape[-1] * m for size in row_major(lead)]
    reads = [x]
    if packed:
        args, more = _picked_packed(t, node, x)
        reads += more
    else:
        stack = w.reshaped((math.prod(w.shape[:-2]), *w.shape[-2:]))
        if stack is None:
            raise Unknown("a stack of matrices along several axes")
        w = stack
        args = fill(
            plain_product(x, w.shape[-1], k), mode=h.DENSE, w=dense_weight(w), w_row=w.strides[-1],
            w_column=w.strides[-2], w_stack=w.strides[-3], w_matrices=w.shape[-3],
        )  # fmt: skip
        reads.append(w)
    fill(args, m=m, x_row=x.strides[-2], x_column=x.strides[-1])
    indices = {name: node.value(f"{name}_indices") for name in ("lhs", "rhs")}
    if indices["rhs"] is None:
        raise Unknown("matrices that are not picked")
    xs: Sequence[int] = [0] * len(lead)
    if indices["lhs"] is None:
        xs = x.broadcast((*lead, m, k)).strides[:-2]
    else:
        x = t.contiguous(x, node)
        fill(args, x=ref(x), x_row=k, x_column=1, x_stack=m * k, x_matrices=x.size // (m * k))
        reads[0] = x
    for name, value in indices.items():
        if value is not None:
            picks = t.array(value)
            picks = t.contiguous(picks.broadcast(lead), node)
            if picks.dtype not in (mx.uint32, mx.int32):
                raise Unknown("indices that do not have 32 bits")
            fill(args, **{name: ref(picks)})
            reads.append(picks)
    shape, (xb, yb) = merged(lead, [xs, y_strides])
    if len(shape) > 4:
        raise Unknown(f"a product over {len(shape)} axes of a batch")
    fill(args, batch_rank=len(shape), batch=shape, x_batch=xb, y_batch=yb)
    _write(t, args, reads, node)


def _picked_packed(t: Translator, node: Node, x: Array) -> tuple[Any, list[Array]]:
    """A `qg_matmul` by a stack of packed matrices, without what picks them."""
    mode, bits, group = packing(node)
    w = node.operand("w")
    if w.ndim != 3:
        raise Unknown("a stack of packed weights along several axes")
    packed, reads = weight(t, [node.value(name) for name in ("w", "scales", "biases")], node)
    columns_first = not setting(node, "transpose")
    wide = w.shape[2] * 32 // bits
    n, k = (wide, w.shape[1]) if columns_first else (w.shape[1], wide)
    args = fill(
        plain_product(x, n, k), w=packed, mode=MODES[mode], bits=bits, group=group,
        columns_first=int(columns_first), w_stack=1, w_matrices=w.shape[0],
    )  # fmt: skip
    return args, reads


def _plus(t: Translator, node: Node, args: Any) -> list[Array]:
    """alpha, and c of an `addmm`: a row for all, or like the result."""
    if setting(node, "beta") != 1:
        raise Unknown("addmm with beta")
    args.alpha = setting(node, "alpha")
    c, out = t.array(node.operand("c")), node.output
    if c.size == out.shape[-1] == (c.shape[-1] if c.ndim else 0):
        bias = t.contiguous(c, node)
        args.bias = ref(bias)
        return [bias]
    if c.dtype != out.dtype or args.batch_rank:
        raise Unknown("addmm of a batch, or of several dtypes")
    added = t.contiguous(c.broadcast(out.shape), node)
    fill(args, add=ref(added), add_row=out.shape[-1])
    return [added]


_ACTIVATIONS = {"": h.IDENTITY, "silu": h.SILU, "gelu": h.GELU, "relu": h.RELU,
                "sigmoid": h.SIGMOID, "tanh": h.TANH}  # fmt: skip


def followed(t: Translator, pattern: Followed) -> None:
    """A product and what is done to its sums, in one step."""
    node, n = pattern.node, pattern.node.output.shape[-1]
    make = quantized_args if node.op == "quantized_matmul" else dense_args
    args, reads = make(t, node)
    if node.op == "addmm":
        reads += _plus(t, node, args)
    args.activation = _ACTIVATIONS[pattern.activation]
    if pattern.bias is not None:
        bias = t.contiguous(pattern.bias, node)
        args.bias = ref(bias)
        reads.append(bias)
    times = None if pattern.times is None else t.array(pattern.times)
    if pattern.gate is not None:
        other, more = make(t, pattern.gate)
        if (other.w_row, other.w_column) == (args.w_row, args.w_column):
            args.w2 = other.w
            reads += more
        else:
            times = _write(t, other, more, pattern.gate)
    add = None if pattern.add is None else t.array(pattern.add)
    for name, given in (("times", times), ("add", add)):
        if given is not None:
            array = t.contiguous(given, node)
            fill(args, **{name: ref(array), f"{name}_row": n})
            reads.append(array)
    gates = [] if pattern.gate is None else [pattern.gate]
    _write(t, args, reads, pattern.last, node, *gates, *pattern.steps[:-1])


PATTERNS[Followed] = followed
