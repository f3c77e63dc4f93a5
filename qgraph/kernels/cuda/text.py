"""What MLX makes of a kernel of `mx.fast.cuda_kernel`: a text, and a name for the compiled code.

Both are as mlx 0.32 has them in `custom_kernel.cpp`.  An MLX that does otherwise finds nothing
under these names and compiles by itself; `tests/gpu/test_kept.py` compares the texts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import mlx.core as mx

Template = Sequence[tuple[str, bool | int | mx.Dtype]]

UTILITIES = "mlx/backend/cuda/device/utils.cuh"
GROUPS = "cooperative_groups.h"
_SPACE = "mlx::core::cu"

TYPES = {
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
_IN_NAMES = TYPES | {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}


@dataclass(frozen=True)
class Module:
    """What is compiled.

    Attributes:
        kernel: its name in the text.
    """

    kernel: str
    text: str

    @property
    def entry(self) -> str:
        return f"{_SPACE}::{self.kernel}"

    @cached_property
    def name(self) -> str:
        """Under which MLX looks for the compiled code."""
        return f"{self.kernel}_{string_hash(self.text.encode()):x}"


def module_of(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
    template: Template = (),
) -> Module:
    """What MLX compiles for a kernel, by what that was made of, and a call of it."""
    kernel = "custom_kernel_" + name + "".join(f"_{_in_name(value)}" for _, value in template)
    arguments = [
        *(
            line
            for name, x in zip(input_names, inputs, strict=True)
            for line in _input(name, x, source)
        ),
        *(f"{TYPES[t]}* {name}" for name, t in zip(output_names, output_dtypes, strict=True)),
    ]
    text = [
        f'\n#include "{UTILITIES}"\n\n#include <{GROUPS}>\n\n{header}',
        f"namespace {_SPACE} {{\n\nnamespace cg = cooperative_groups;\n\n",
        f"__global__ void {kernel}(\n" + ",\n".join(f"    {a}" for a in arguments) + ") {\n",
        *(f"  {_constant(n, value)};\n" for n, value in template),
        "\n" if template else "",
        f"{source}\n}}\n\n}} // namespace {_SPACE}\n",
    ]
    return Module(kernel, "".join(text))


def _input(name: str, array: mx.array, source: str) -> Iterator[str]:
    yield f"const {TYPES[array.dtype]}* {name}"
    for more, type in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
        if array.ndim > 0 and f"{name}_{more}" in source:
            yield f"const __grid_constant__ {type} {name}_{more}"


def _constant(name: str, value: bool | int | mx.Dtype) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()}"
    if isinstance(value, int):
        return f"constexpr int {name} = {value}"
    return f"using {name} = {TYPES[value]}"


def _in_name(value: bool | int | mx.Dtype) -> str:
    if isinstance(value, bool):
        return "t" if value else "f"
    return str(value) if isinstance(value, int) else _IN_NAMES[value]


def string_hash(text: bytes) -> int:
    """`std::hash<std::string>` of libstdc++, which MLX is built with.

    >>> string_hash(b"")
    6142509188972423790
    """
    number: int = _hash_bytes()(text, len(text), 0xC70F6907)
    return number


@cache
def _hash_bytes() -> Callable[[bytes, int, int], int]:
    function = ctypes.CDLL("libstdc++.so.6")._ZSt11_Hash_bytesPKvmm
    function.restype, function.argtypes = ctypes.c_size_t, (ctypes.c_char_p, *[ctypes.c_size_t] * 2)
    return function
