"""Arguments for which MLX ends the process or reads beyond an array (mlx 0.32.4).

They are refused before MLX sees them, whoever made them: a traced function or a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..ir.graph import Value

_INT32 = range(-(2**31), 2**31)
"""What MLX takes for a size; it casts what is larger to a size that `std::vector` refuses."""


def fatal(op: str, args: Mapping[str, Any]) -> str | None:
    """Why MLX would not survive these arguments of an op, or None.

    >>> fatal("conv1d", {"groups": 0})
    'groups=0'
    """
    check = _CHECKS.get(op)
    return None if check is None else check(args)


def _groups(args: Mapping[str, Any]) -> str | None:
    return "groups=0" if args.get("groups", 1) == 0 else None


def _quantized(args: Mapping[str, Any]) -> str | None:
    zero = next((n for n in ("group_size", "bits") if args.get(n) == 0), None)
    return zero and f"{zero}=0"


def _product(args: Mapping[str, Any]) -> str | None:
    empty = [n for n in ("x", "w") if isinstance(v := args.get(n), Value) and 0 in v.shape]
    return f"{empty[0]} has no elements" if empty else _quantized(args)


def _index(args: Mapping[str, Any]) -> str | None:
    a, index = args.get("a"), args.get("index")
    if not isinstance(a, Value):
        return None
    for axis, part in indexed_axes(a.ndim, index):
        if isinstance(part, slice) and part.step == 0:
            return "a slice has step 0"
        size = a.shape[axis] if axis < a.ndim else 0
        if type(part) is int and axis < a.ndim and not -size <= part < size:
            return f"index {part} is outside of axis {axis}, of {size}"
    return None


def indexed_axes(ndim: int, index: Any) -> Iterator[tuple[int, Any]]:
    """The axes that the parts of an index are for: those that add no axis and stand for none.

    >>> list(indexed_axes(4, (2, ..., None, 5)))
    [(0, 2), (3, 5)]
    """
    parts = index if isinstance(index, tuple | list) else (index,)
    axis, taken = 0, sum(part is not None and part is not ... for part in parts)
    for part in parts:
        if part is ...:
            axis += ndim - taken
        elif part is not None:
            yield axis, part
            axis += 1


def _take(args: Mapping[str, Any]) -> str | None:
    a, index, axis = args.get("a"), args.get("indices"), args.get("axis")
    if not isinstance(a, Value) or type(index) is not int:
        return None
    if axis is not None and not (type(axis) is int and -a.ndim <= axis < a.ndim):
        return None  # which MLX refuses
    size = a.type.size if axis is None else a.shape[axis]
    return None if -size <= index < size else f"index {index} is outside of {size}"


def _slice(args: Mapping[str, Any]) -> str | None:
    a, sizes = args.get("a"), args.get("slice_size")
    if not isinstance(a, Value) or not isinstance(sizes, tuple | list) or len(sizes) != a.ndim:
        return None
    fits = all(0 <= size <= whole for size, whole in zip(sizes, a.shape, strict=True))
    return None if fits else f"a slice of {tuple(sizes)} is none of {a.type}"


def _sizes(*names: str) -> Callable[[Mapping[str, Any]], str | None]:
    def check(args: Mapping[str, Any]) -> str | None:
        for name in names:
            given = args.get(name)
            for size in given if isinstance(given, tuple | list) else (given,):
                if isinstance(size, int) and size not in _INT32:
                    return f"{name} holds {size}, more than 32 bits"
        return None

    return check


def _view(args: Mapping[str, Any]) -> str | None:
    """`as_strided` reads wherever it is told to."""
    a, shape, strides = args.get("a"), args.get("shape"), args.get("strides")
    offset = args.get("offset", 0)
    if (wrong := _sizes("shape", "strides", "offset")(args)) or not isinstance(a, Value):
        return wrong
    shape = a.shape if shape is None else shape
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if len(shape) != len(strides) or 0 in shape:
        return None  # which MLX refuses, or which reads nothing
    steps = [(size - 1) * step for size, step in zip(shape, strides, strict=True)]
    first = offset + sum(step for step in steps if step < 0)
    last = offset + sum(step for step in steps if step > 0)
    if first < 0 or last >= max(1, a.type.size):
        return f"it would read the elements {first} to {last} of {a.type.size}"
    return None


_CHECKS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_general"), _groups),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), _groups),
    **dict.fromkeys(("quantize", "dequantize", "qqmm", "gather_qqmm"), _quantized),
    **dict.fromkeys(("quantized_matmul", "gather_qmm"), _product),
    **dict.fromkeys(("getitem", "at_set", "at_add", "at_subtract", "at_multiply"), _index),
    **dict.fromkeys(("at_divide", "at_maximum", "at_minimum"), _index),
    **dict.fromkeys((f"fft.{i}{r}fft{n}" for i in ("", "i") for r in ("", "r") for n in "2n"),
                    _sizes("s")),
    "take": _take,
    "slice": _slice,
    "split": _sizes("indices_or_sections"),
    "as_strided": _view,
}  # fmt: skip
