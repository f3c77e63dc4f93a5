"""NVIDIA's compiler in the process: the library that MLX compiles its kernels with, and has loaded.

Much of what MLX takes to compile a kernel of ours are headers that ours do not ask for: on one core
a region is ready in 8 s for 15, a product alone in 0.9 for 4.9, with 30 KB of code for 233.  So
others stand here in their place, with what arguments of kernels are made of and no more.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

from .text import GROUPS, UTILITIES, Module

VERSIONS = (13, 12)
"""Of CUDA, that MLX has wheels for."""
HEADERS = {
    UTILITIES: """
#pragma once
#include "mlx/backend/cuda/device/config.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long;
namespace mlx::core::cu {
template <typename T>
struct Numbers {
  T v[MAX_NDIM];
  __device__ const T& operator[](int i) const { return v[i]; }
};
using Shape = Numbers<int32_t>;
using Strides = Numbers<int64_t>;
}
""",
    GROUPS: "#pragma once\nnamespace cooperative_groups {}\n",
}
"""In place of MLX's and CUDA's."""


@dataclass(frozen=True)
class Code:
    """A kernel's machine code, and the name of its entry there."""

    code: bytes
    entry: str


@dataclass(frozen=True)
class Nvrtc:
    """The compiler. It works in several threads at once.

    Attributes:
        folders: where headers are looked for.
    """

    library: ctypes.CDLL
    folders: Sequence[Path]

    def __call__(self, module: Module, arch: str) -> Code | None:
        """A kernel compiled for a GPU such as "sm_90a"; None if it does not compile."""
        program = ctypes.c_void_p()
        made = self.library.nvrtcCreateProgram(
            ctypes.byref(program), module.text.encode(), b"qgraph.cu", len(HEADERS),
            _texts(HEADERS.values()), _texts(HEADERS),
        )  # fmt: skip
        if made:
            return None
        try:
            return self._compiled(program, module.entry.encode(), arch)
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _compiled(self, program: ctypes.c_void_p, entry: bytes, arch: str) -> Code | None:
        flags = ["--device-as-default-execution-space", f"--gpu-architecture={arch}", "-w",
                 *(f"--include-path={folder}" for folder in self.folders)]  # fmt: skip
        lib, lowered, size = self.library, ctypes.c_char_p(), ctypes.c_size_t()
        failed = (
            lib.nvrtcAddNameExpression(program, entry)
            or lib.nvrtcCompileProgram(program, len(flags), _texts(flags))
            or lib.nvrtcGetLoweredName(program, entry, ctypes.byref(lowered))
            or lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
        )
        code = ctypes.create_string_buffer(size.value)
        if failed or lib.nvrtcGetCUBIN(program, code) or lowered.value is None:
            return None
        return Code(code.raw, lowered.value.decode())


def _texts(texts: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


@cache
def compiler() -> Nvrtc | None:
    """The compiler with what it needs to read, as MLX finds both; None where one is missing."""
    for version in VERSIONS:
        try:
            library = ctypes.CDLL(f"libnvrtc.so.{version}")
        except OSError:
            continue
        own = Path(mx.__file__).parent / "include"
        cuda = next(filter(_holds_types, _cuda_headers(version)), None)
        if cuda is not None and (own / "mlx/backend/cuda/device/config.h").is_file():
            return Nvrtc(library, (own, cuda))
    return None


def _cuda_headers(version: int) -> Iterator[Path]:
    packages = Path(mx.__file__).parent.parent / "nvidia"
    yield packages / (f"cu{version}" if version >= 13 else "cuda_runtime") / "include"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "include"
    yield Path("/usr/local/cuda/include")


def _holds_types(folder: Path) -> bool:
    return (folder / "cuda_bf16.h").is_file()
