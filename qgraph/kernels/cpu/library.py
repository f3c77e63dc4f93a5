"""The C++ of `cpu/`, built for one format by the machine's own compiler when it is first needed.

MLX on Linux builds its fused CPU kernels with `g++` too, so this asks for nothing new.  What is
built stays in the user's cache folder, under a name made of the source, the flags and the
processor's instructions.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import platformdirs

from ..base import Problem

COMPILER = "g++"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-pthread", "-shared", "-fPIC")

_FORMATS = {"mxfp4": ("E2M1", "E8M0"), "nvfp4": ("E2M1", "E4M3"), "mxfp8": ("E4M3", "E8M0")}
_SCALES = {mx.float32: "Float32", mx.float16: "Float16", mx.bfloat16: "BFloat16"}

Multiply = Callable[..., None]
"""Addresses of x, w_q, scales, biases, y and of room for x; then m, n, k and threads:
`qgraph_multiply`."""

Attend = Callable[..., None]
"""Addresses of q, k, v and y; then batch, heads, key heads, length, dim, keys seen, scale and
threads: `qgraph_attend`."""


@cache
def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if sys.platform != "linux":
        return "it is built with g++, on Linux"
    if shutil.which(COMPILER) is None:
        return "g++ is not installed"
    return None


def multiply_for(problem: Problem) -> Multiply | None:
    """The product for a problem's format; None, with a warning, if it cannot be built."""
    code, scale = _FORMATS.get(problem.mode) or (
        "Integer",
        _SCALES[problem.scales_dtype],
    )
    return _product(problem.bits, problem.group_size, code, scale)


@cache
def _product(bits: int, group: int, code: str, scale: str) -> Multiply | None:
    choice = {"BITS": bits, "GROUP": group, "CODE": code, "SCALE": scale}
    flags = [f"-DQGRAPH_{name}={value}" for name, value in choice.items()]
    types = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 3 + [ctypes.c_int]
    return _function("qgraph_multiply", types, "simd", *flags)


@cache
def attend() -> Attend | None:
    """The attention of one query a head; None, with a warning, if it cannot be built."""
    types = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 6 + [ctypes.c_float, ctypes.c_int]
    return _function("qgraph_attend", types, "attention")


def _function(name: str, types: list[Any], *source: str) -> Callable[..., None] | None:
    """A function of a library, given the pool of threads that all of them share."""
    try:
        for_each = _built("pool").qgraph_for_each
        function = getattr(_built(*source), name)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error) or type(error).__name__).splitlines()
        why = next((line for line in lines if "error" in line), lines[0])
        warnings.warn(
            f"the CPU kernel could not be built ({why}); a slower one stands in for it",
            stacklevel=2,
        )
        return None
    function.argtypes = [ctypes.c_void_p, *types]
    function.restype = None
    return partial(function, ctypes.cast(for_each, ctypes.c_void_p))


@cache
def _built(name: str, *choice: str) -> ctypes.CDLL:
    """The library of `cpu/NAME.cpp`."""
    flags = (*FLAGS, *choice)
    texts = resources.files("qgraph.kernels.cpu")
    header = (texts / "lanes.hpp").read_text()
    source = (texts / f"{name}.cpp").read_text().replace('#include "lanes.hpp"', header)
    key = hashlib.sha256(repr((source, flags, _processor())).encode()).hexdigest()[:20]
    folder = _folder()
    place = folder / f"{name}-{key}.so"
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / place.name
            command = [COMPILER, *flags, "-x", "c++", "-", "-o", str(made)]
            subprocess.run(command, input=source, check=True, capture_output=True, text=True)
            os.replace(made, place)  # at once, as another process may be building the same
    return ctypes.CDLL(str(place))


@cache
def _folder() -> Path:
    """Where libraries are kept: the user's cache, or else a folder of this process."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        kept = Path(platformdirs.user_cache_dir("qgraph")) / "cpu"
        kept.mkdir(parents=True, exist_ok=True)
        if os.access(kept, os.W_OK):
            return kept
    scratch = tempfile.mkdtemp(prefix="qgraph-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return Path(scratch)


@cache
def _processor() -> tuple[Any, ...]:
    """What `-march=native` means here: a home folder may be shared by several machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = re.findall(r"^(?:flags|Features|model name|CPU part)\s*:.*$", text, re.MULTILINE)
    return platform.machine(), *sorted(set(lines))
