"""Run tests with the CPU kernels built by other flags.

    python -m tests.with_flags -mavx2,-mfma,-mf16c tests/kernels tests/runtime/test_regions.py
    python -m tests.with_flags -msse2 …    # plain vectors of four, as NEON has them

and under AddressSanitizer, where NumPy's arrays are watched too:

    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \\
    ASAN_OPTIONS=detect_leaks=0 python -m tests.with_flags \\
    -march=native,-fsanitize=address,-fsanitize=undefined,-fno-sanitize-recover=all …
"""

import sys
import tempfile

import platformdirs
import pytest

from qgraph.kernels.cpu import library


def main(flags: str, *arguments: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        platformdirs.user_cache_dir = lambda name: f"{folder}/{name}"  # type: ignore[assignment]
        kept = [flag for flag in library.FLAGS if flag != "-march=native"]
        library.FLAGS = (*kept, *flags.split(","))  # type: ignore[assignment]
        return int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
