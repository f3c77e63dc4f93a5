"""For tests of what only a machine with g++ does."""

import pytest

from qgraph.kernels.cpu import library as cpu_library

needs_compiler = pytest.mark.skipif(
    cpu_library.missing() is not None, reason=f"simd: {cpu_library.missing()}"
)


def forget_builds() -> None:
    """Look for the compiler, the cache folder and what is built there anew."""
    for function in (cpu_library.missing, cpu_library.library, cpu_library._folder):
        function.cache_clear()
