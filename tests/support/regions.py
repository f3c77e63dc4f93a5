"""Regions for tests: steps over NumPy arrays, run by the engine of `kernels/cpu`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph.kernels.cpu.header import header
from qgraph.kernels.cpu.region import Region

Array = npt.NDArray[Any]
h = header()

BF16 = np.dtype([("bits", np.uint16)])
"""What stands for bfloat16, which NumPy lacks."""

DTYPES = {
    np.dtype(name): getattr(h, code)
    for name, code in {
        "bool": "BOOL", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
        "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "float16": "F16",
        "float32": "F32",
    }.items()
}  # fmt: skip
DTYPES[BF16] = h.BF16
FLOATS = [np.dtype(np.float32), np.dtype(np.float16), BF16]
EPSILON = {FLOATS[0]: 2.0**-23, FLOATS[1]: 2.0**-10, BF16: 2.0**-7}


def as_dtype(x: Array, dtype: Any) -> Array:
    """Rounded to a dtype, `BF16` among them."""
    if dtype != BF16:
        return np.ascontiguousarray(x.astype(dtype))
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded.astype(np.uint16).view(BF16)


def wide(x: Array) -> Array:
    """float64 of any dtype."""
    if x.dtype == BF16:
        x = (np.ascontiguousarray(x["bits"]).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


class Steps:
    """A region in the making: arrays are buffers, and `add` appends a step."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.buffers: list[Any] = []
        self.steps: list[Any] = []
        self.args = bytearray()

    def ref(self, array: Array | None) -> Any:
        if array is None:
            return h.Ref(-1, 0, 0)
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        found = [i for i, known in enumerate(self.arrays) if known is base]
        if not found:
            found = [len(self.arrays)]
            self.arrays.append(base)
            self.buffers.append(h.Buffer(h.GIVEN, 0, found[0], base.nbytes))
        return h.Ref(found[0], DTYPES[array.dtype], array.ctypes.data - base.ctypes.data)

    def place(self, data: Any) -> int:
        """Where the bytes of something stand in the arguments."""
        at = len(self.args)
        self.args += bytes(data)
        self.args += bytes(-len(self.args) % 8)
        return at

    def add(self, kind: int, args: Any, flags: int = h.BARRIER) -> None:
        self.steps.append(h.Step(kind, flags, self.place(args)))

    def made(self) -> Region:
        return Region(self.buffers, self.steps, bytes(self.args), pointers=len(self.arrays))

    def run(self, threads: int = 2) -> None:
        self.made().run([a.ctypes.data for a in self.arrays], threads)


def strides(array: Array, axes: int | None = None) -> list[int]:
    """In elements; missing leading axes are broadcast."""
    own = [
        s // array.itemsize if n != 1 else 0
        for s, n in zip(array.strides, array.shape, strict=True)
    ]
    return [0] * ((axes or len(own)) - len(own)) + own


def filled(values: Sequence[int], size: int = 8) -> Any:
    return (ctypes.c_int64 * size)(*values)


def close(got: Array, want: Array, ulps: float, dtype: Any = None) -> None:
    """Within some ulps of the dtype, and NaN and infinities where they should be."""
    epsilon = EPSILON[got.dtype if dtype is None else dtype]
    np.testing.assert_allclose(wide(got), want, rtol=ulps * epsilon, atol=ulps * epsilon * 1e-30)


class Chain:
    """Instructions of one elementwise step; values are their numbers."""

    def __init__(self, *inputs: Array, shape: Sequence[int] | None = None) -> None:
        self.inputs, self.outputs, self.code = list(inputs), [], []  # type: ignore[var-annotated]
        self.shape = list(shape or np.broadcast_shapes(*(a.shape for a in inputs)))

    def do(self, op: str, dtype: Any, *operands: int, value: Any = None) -> int:
        made = h.Instruction(getattr(h, f"OP_{op}"), DTYPES[np.dtype(dtype)])
        made.a, made.b, made.c = [*operands, -1, -1, -1][:3]
        if isinstance(value, float):
            value = int(np.float64(value).view(np.int64))
        made.value = value or 0
        self.code.append(made)
        return len(self.inputs) + len(self.code) - 1

    def to(self, value: int, array: Array) -> Chain:
        self.outputs.append((value, array))
        return self

    def step(self, steps: Steps) -> Steps:
        rank = len(self.shape)

        def operand(array: Array) -> Any:
            return h.Operand(steps.ref(array), filled(strides(array, rank)))

        args = h.Elementwise(rank, filled(self.shape))
        args.inputs, args.outputs = len(self.inputs), len(self.outputs)
        args.instructions = len(self.code)
        inputs = [operand(a) for a in self.inputs]
        outputs = [h.Output(operand(a), v) for v, a in self.outputs]
        args.input_at = steps.place((h.Operand * len(inputs))(*inputs))
        args.instruction_at = steps.place((h.Instruction * len(self.code))(*self.code))
        args.output_at = steps.place((h.Output * len(outputs))(*outputs))
        steps.add(h.ELEMENTWISE, args)
        return steps
