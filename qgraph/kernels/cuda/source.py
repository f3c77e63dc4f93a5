"""The CUDA sources beside their kernels, as `mx.fast.cuda_kernel` takes them."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path


@cache
def cuda_source(room: str, name: str) -> str:
    """A line that includes `kernels/ROOM/NAME.cuh`, or its text where it is not a file.

    MLX hashes the text of a kernel at every launch: on an H200's host a launch took 5.7 µs with
    the whole source of `mma` in it, 3.3 with this line.  In an archive there is no file to include.

    >>> cuda_source("matmul", "tensor_cores").startswith("#include")
    True
    """
    source = resources.files("qgraph.kernels") / room / f"{name}.cuh"
    path = Path(str(source))
    return f'#include "{path}"\n' if path.is_file() else source.read_text()
