"""For tests of numbers, not of fusing: on a CPU MLX has g++ compile each chain that it fuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def unfused() -> Iterator[None]:
    """Programs that are compiled and run here run op by op, a second a chain sooner."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()
