"""Types of values: a shape and a dtype."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .errors import ShapeError

SHORT_NAMES: dict[mx.Dtype, str] = {
    mx.bool_: "bool",
    mx.uint8: "u8",
    mx.uint16: "u16",
    mx.uint32: "u32",
    mx.uint64: "u64",
    mx.int8: "i8",
    mx.int16: "i16",
    mx.int32: "i32",
    mx.int64: "i64",
    mx.float16: "f16",
    mx.bfloat16: "bf16",
    mx.float32: "f32",
    mx.float64: "f64",
    mx.complex64: "c64",
}
DTYPES: dict[str, mx.Dtype] = {short: dtype for dtype, short in SHORT_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape and dtype of a value, printed like ``f16[1,4096]``.

    >>> TensorType((1, 4096), mx.float16)
    f16[1,4096]
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """How many there are along the last axis; 1 of a number.

        >>> TensorType((1, 3, 4096), mx.float16).rows
        3
        """
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of a contiguous array of this type."""
        return self.size * self.dtype.size

    def __str__(self) -> str:
        return f"{SHORT_NAMES[self.dtype]}[{','.join(map(str, self.shape))}]"

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class Spec:
    """A symbolic argument of a traced function; made by `spec`."""

    type: TensorType
    name: str | None = field(default=None)
    parameter: bool = field(default=False)


def type_of(array: mx.array) -> TensorType:
    return TensorType(tuple(array.shape), array.dtype)


def spec(
    shape: Sequence[int] | int,
    dtype: mx.Dtype = mx.float32,
    name: str | None = None,
    *,
    parameter: bool = False,
) -> Spec:
    """Describe an argument for `qgraph.trace`.

    Args:
        shape: its shape; an int is a vector's length.
        dtype: its MLX dtype.
        name: how prints call it; by default the name of the function's parameter.
        parameter: True for a weight handed in at call time, the same from call to call; what
            depends on parameters alone then runs in `Program.prepare`.

    Raises:
        ShapeError: sizes that no array has, or a dtype that is none of MLX's.

    >>> spec((1, 4096), mx.float16).type
    f16[1,4096]
    """
    dims = (shape,) if isinstance(shape, int) else shape
    if not isinstance(dims, Sequence) or not all(map(_is_size, dims)):
        raise ShapeError(
            f"spec: {shape!r} is no shape",
            hint="give sizes from 0 to 2147483647: qg.spec((1, 4096))",
        )
    if not isinstance(dtype, mx.Dtype):
        raise ShapeError(
            f"spec: dtype={dtype!r} is no dtype of MLX", hint="give one, such as qg.float16"
        )
    return Spec(TensorType(tuple(map(int, dims)), dtype), name, parameter)


def _is_size(size: Any) -> bool:
    try:
        return not isinstance(size, bool) and 0 <= operator.index(size) < 2**31
    except TypeError:
        return False


def as_int(array: mx.array) -> int:
    """The integer that an array without axes holds."""
    number = array.item()
    assert isinstance(number, int)
    return number
