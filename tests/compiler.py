"""For tests of what only a machine with g++ does."""

import pytest

from qgraph.kernels.cpu_library import missing

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"simd: {missing()}")
