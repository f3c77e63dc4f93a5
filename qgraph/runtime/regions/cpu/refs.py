"""Arrays in the engine's words: `region.h` has the structs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ....kernels.cpu.header import header
from ..arrays import Array
from ..unknown import Unknown

h = header()

DTYPES: dict[mx.Dtype, int] = {
    mx.bool_: h.BOOL, mx.uint8: h.U8, mx.uint16: h.U16, mx.uint32: h.U32, mx.uint64: h.U64,
    mx.int8: h.I8, mx.int16: h.I16, mx.int32: h.I32, mx.int64: h.I64,
    mx.float16: h.F16, mx.bfloat16: h.BF16, mx.float32: h.F32,
}  # fmt: skip

FLOATS = frozenset({mx.float32, mx.float16, mx.bfloat16})


def ref(array: Array | None) -> Any:
    """A `qg_ref` to an array's first element; None is left out."""
    if array is None:
        return h.Ref(-1, 0, 0)
    return h.Ref(array.buffer.number, dtype_number(array.dtype), array.offset)


def dtype_number(dtype: mx.Dtype) -> int:
    if dtype not in DTYPES:
        raise Unknown(f"values of {dtype}".replace("mlx.core.", ""))
    return DTYPES[dtype]


def fill(struct: Any, **fields: Any) -> Any:
    """Set fields of a struct; sequences fill arrays from their beginning."""
    for name, value in fields.items():
        if isinstance(value, Sequence):
            place = getattr(struct, name)
            if len(value) > len(place):
                raise Unknown(f"{len(value)} axes")
            place[: len(value)] = value
        else:
            setattr(struct, name, value)
    return struct


def padded(strides: Sequence[int], rank: int = 4) -> list[int]:
    """Strides with zeros before them."""
    return [0] * (rank - len(strides)) + list(strides)
