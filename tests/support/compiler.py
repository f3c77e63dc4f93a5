"""For tests of what only a machine with g++ does."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from qgraph.kernels.cpu import library as cpu_library

needs_compiler = pytest.mark.skipif(
    cpu_library.missing() is not None, reason=f"simd: {cpu_library.missing()}"
)


def forget_builds() -> None:
    """Look for the compiler, the cache folder and what is built there anew."""
    for function in (cpu_library.missing, cpu_library.library, cpu_library._folder):
        function.cache_clear()


def loaded(source: Path, *flags: str) -> ctypes.CDLL:
    """C++ as a library; nearly all of a test's time is the compiler's, which -Og takes least of."""
    made = source.with_suffix(".so")
    command = ["g++", "-std=c++17", "-Og", "-w", "-shared", "-fPIC", *flags, str(source)]
    subprocess.run([*command, "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))
