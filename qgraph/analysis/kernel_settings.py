"""What a node for one of our own kernels must hold, so that the kernel stays within its arrays.

MLX checks the shapes of its own ops.  Ours read and write by address, by what `problem`, `cores` or
`heads` say; a graph may come out of a file, so each of them is held against the node's operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..ir.graph import Node, Value
from ..kernels import Problem, kernel
from ..kernels.attention.decode_attention import FAR
from ..kernels.attention.tail_attention import MOST_ROWS
from ..kernels.base import HALF
from ..kernels.cpu.library import missing
from ..tracing.nodes import placeholder
from ..types import TensorType, type_of

MOST_CORES = 1024
"""A thread is started for each."""
_BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}
_GROUPS = {"affine": (32, 64, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
_FLOATS = (*HALF, mx.float32)


def wrong_setting(node: Node) -> str | None:
    """What in a node would lead its kernel astray, or None; nodes of MLX's ops are none of ours."""
    check = _CHECKS.get(node.op)
    return None if check is None else check(node)


def _is_size(number: Any, least: int = 1, most: int = 2**31 - 1) -> bool:
    return type(number) is int and least <= number <= most


def _wrong_problem(node: Node) -> str | None:
    p, name = node.args.get("problem"), node.args.get("kernel")
    if not isinstance(p, Problem) or not isinstance(name, str):
        return "has no problem or no kernel"
    sizes = [p.m, p.n, p.k]
    if not all(map(_is_size, sizes)) or not _is_size(p.experts, 0) or type(p.transpose) is not bool:
        return f"has a problem of sizes {(*sizes, p.experts)}"
    if not _is_size(p.cores, 1, MOST_CORES):
        return f"asks for {p.cores} cores, from 1 to {MOST_CORES} there may be"
    if not isinstance(p.mode, str) or p.bits not in _BITS.get(p.mode, ()):
        return f"has no such format: {p.mode} of {p.bits} bits"
    if p.group_size not in _GROUPS[p.mode]:
        return f"has no such groups: {p.group_size} in mode {p.mode}"
    wanted = _FLOATS if p.mode == "affine" else (mx.uint8,)
    if p.dtype not in _FLOATS or p.scales_dtype not in wanted:
        return f"has dtypes that no product takes: {p.dtype}, scales {p.scales_dtype}"
    if p.backend not in ("cpu", "cuda", "metal") or not isinstance(p.arch, str):
        return f"is for no backend there is: {p.backend}"
    try:
        packed_types(name, p)
        why = kernel(name).applies(p)
    except (ValueError, RecursionError) as error:
        return f"cannot be carried out: {error}"
    # Where there is no compiler, another kernel stands in for one that is built.
    return None if why is None or why == missing() else f"has kernel {name}, which refuses: {why}"


def raw_types(p: Problem) -> list[TensorType]:
    """The types of the packed weight, its scales and, for affine, its biases.

    >>> raw_types(Problem(1, 8, 64, mx.float32, "affine", 4, 64))
    [u32[8,8], f32[8,1], f32[8,1]]
    """
    rows, columns = (p.n, p.k) if p.transpose else (p.k, p.n)
    if columns % p.group_size or columns * p.bits % 32:
        raise ValueError(f"groups of {p.group_size} do not divide {columns}")
    leading = (p.experts, rows) if p.experts else (rows,)
    scales = TensorType((*leading, columns // p.group_size), p.scales_dtype)
    w = TensorType((*leading, columns * p.bits // 32), mx.uint32)
    return [w, scales, scales] if p.mode == "affine" else [w, scales]


@lru_cache(maxsize=1024)
def packed_types(name: str, p: Problem) -> tuple[TensorType, ...]:
    """The types of what kernel `name` reads at each call."""
    parts = [placeholder(type) for type in raw_types(p)]
    return tuple(map(type_of, kernel(name).pack(parts, p)))


def _wrong_operand(node: Node, name: str, wanted: Sequence[TensorType]) -> str | None:
    given = [v.type if isinstance(v, Value) else v for v in node.args[name]]
    if given == list(wanted):
        return None
    return f"reads {name} of {given}, its kernel takes {list(wanted)}"


def _pack_weight(node: Node) -> str | None:
    return _wrong_problem(node) or _wrong_operand(node, "parts", raw_types(node.args["problem"]))


def _packed_rows(node: Node) -> str | None:
    if (wrong := _wrong_problem(node)) is not None:
        return wrong
    p, name = node.args["problem"], node.args["kernel"]
    if not kernel(name).gives_rows or p.experts:
        return f"has kernel {name}, which gives no rows"
    if not mx.issubdtype(node.operand("indices").dtype, mx.integer):
        return f"reads rows by {node.operand('indices').type}"
    return _wrong_operand(node, "packed", packed_types(name, p))


def _product(node: Node) -> str | None:
    if (wrong := _wrong_problem(node)) is not None:
        return wrong
    p: Problem = node.args["problem"]
    x = node.operand("x").type
    if x.dtype != p.dtype or x.shape[-1:] != (p.k,):
        return f"multiplies {x}, its problem is {p}"
    gathers = node.op == "packed_gather"
    if kernel(node.args["kernel"]).gathers != gathers:
        return f"has kernel {node.args['kernel']}, which is for another op"
    if gathers == (p.experts == 0) or (not gathers and x.size != p.m * p.k):
        return f"multiplies {x}, its problem is {p}"
    return _wrong_operand(node, "packed", packed_types(node.args["kernel"], p))


def _is_position(value: Value | None) -> bool:
    return value is not None and value.type.size == 1 and mx.issubdtype(value.dtype, mx.integer)


def _is_limit(value: Value | None, batch: int) -> bool:
    """A position, or one for each of the batch."""
    if value is None or not mx.issubdtype(value.dtype, mx.integer):
        return False
    return value.type.size == 1 or value.type.size == batch


def _decode_attention(node: Node) -> str | None:
    q, k, v = (node.operand(name) for name in "qkv")
    if type(node.args["scale"]) not in (int, float):
        return f"is scaled by {node.args['scale']!r}"
    cores, window = node.args.get("cores", 0), node.args.get("window", 0)
    if not _is_size(cores, 0, MOST_CORES):
        return f"asks for {cores} cores, from 0 to {MOST_CORES} there may be"
    if not all(x.ndim == 4 for x in (q, k, v)) or 0 in (*q.shape, *k.shape, *v.shape):
        return f"attends from {q.type} to {k.type}"
    batch, heads, queries, dim = q.shape
    same = q.dtype == k.dtype == v.dtype and q.dtype in _FLOATS and v.shape[:3] == k.shape[:3]
    if not same or (k.shape[0], k.shape[3]) != (batch, dim) or heads % k.shape[1]:
        return f"attends from {q.type} to {k.type} and {v.type}"
    if not _is_limit(node.value("last"), batch):
        return "attends up to no position"
    if node.args.get("first") is not None and not _is_limit(node.value("first"), batch):
        return "attends from no position"
    if not _is_size(window, 0, FAR):
        return f"has a window of {window!r}"
    return _wrong_scores(node, (batch, heads, queries, k.shape[2]))


def _wrong_scores(node: Node, shape: tuple[int, ...]) -> str | None:
    """What is wrong with the mask or the sinks over scores of this shape."""
    mask = node.args.get("mask")
    if mask is not None:
        mask = node.value("mask")
        fits = mask is not None and len(mask.shape) <= 4 and all(
            a in (1, b) for a, b in zip(mask.shape[::-1], shape[::-1], strict=False)
        )  # fmt: skip
        if mask is None or not fits or mask.dtype not in (mx.bool_, *_FLOATS):
            return f"has a mask {node.args['mask']!r} over scores of {shape}"
    return _wrong_sinks(node, shape[1])


def _wrong_sinks(node: Node, heads: int) -> str | None:
    if node.args.get("sinks") is None:
        return None
    sinks = node.value("sinks")
    fits = sinks is not None and sinks.type == TensorType((heads,), node.operand("q").dtype)
    return None if fits else f"has sinks {node.args['sinks']!r} for {heads} heads"


def _cached_attention(node: Node) -> str | None:
    keys, values = node.operand("keys"), node.operand("values")
    if keys.ndim != 4 or keys.type != values.type or keys.dtype not in _FLOATS or 0 in keys.shape:
        return f"has caches of {keys.type} and {values.type}"
    batch, kv_heads, _, dim = keys.shape
    heads, rope = node.args["heads"], node.args["rope"]
    if any(type(x) not in (int, float) for x in (node.args["scale"], rope[3], rope[2] or 0.0)):
        return f"is scaled by {node.args['scale']!r}, turned by {rope}"
    for name, at in zip("qkv", heads, strict=True):
        x, (number, start, step) = node.operand(name), at
        sizes = _is_size(number) and _is_size(start, 0) and _is_size(step)
        if not sizes or start + number * dim > step or x.type.size != batch * step:
            return f"finds heads {tuple(at)} in {name}, {x.type}"
        if x.dtype != keys.dtype or (number % kv_heads if name == "q" else number != kv_heads):
            return f"puts heads {tuple(at)} of {x.type} into {keys.type}"
    if not _is_size(rope[0], 0, dim) or rope[0] % 2 or type(rope[1]) is not bool:
        return f"turns {rope[0]} of {dim} numbers"
    freqs = node.value("freqs")
    if freqs is not None and freqs.shape != (rope[0] // 2,):
        return f"turns {rope[0]} numbers by {freqs.type}"
    names = ["position", "last", *["offset"] * (node.value("offset") is not None)]
    if not all(_is_position(node.value(name)) for name in names):
        return "has no positions"
    if not _is_size(window := node.args.get("window", 0), 0, FAR):
        return f"has a window of {window!r}"
    return _wrong_sinks(node, heads[0][0])


def _tail_attention(node: Node) -> str | None:
    if (wrong := _cached_attention(node)) is not None:
        return wrong
    batch, kv_heads, _, dim = node.operand("keys").shape
    positions = node.operand("tail_positions").type
    if positions.dtype != mx.int32 or not _is_size(positions.size, 1, MOST_ROWS):
        return f"has a tail of positions {positions}, from 1 to {MOST_ROWS} there may be"
    wanted = TensorType((batch, kv_heads, positions.size, dim), node.operand("keys").dtype)
    for name in ("tail_keys", "tail_values"):
        if node.operand(name).type != wanted or positions.shape != (positions.size,):
            return f"has a tail of {node.operand(name).type} and positions {positions}"
    return None


def _merge_tail(node: Node) -> str | None:
    cache, tail, positions = (node.operand(name).type for name in ("cache", "tail", "positions"))
    fits = (
        len(cache.shape) == 4 == len(tail.shape) and cache.shape[3] % 8 == 0
        and tail.shape == (*cache.shape[:2], *positions.shape, cache.shape[3])
        and tail.dtype == cache.dtype and cache.dtype in _FLOATS and positions.dtype == mx.int32
        and 0 not in cache.shape and _is_size(positions.size, 1, MOST_ROWS)
    )  # fmt: skip
    return None if fits else f"merges a tail {tail} at {positions} into {cache}"


_CHECKS: dict[str, Callable[[Node], str | None]] = {
    "pack_weight": _pack_weight,
    "packed_matmul": _product,
    "packed_gather": _product,
    "packed_rows": _packed_rows,
    "decode_attention": _decode_attention,
    "cached_attention": _cached_attention,
    "tail_attention": _tail_attention,
    "merge_tail": _merge_tail,
}
