"""The CUDA sources of `cuda/`, as `mx.fast.cuda_kernel` takes them."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path


@cache
def cuda_source(name: str) -> str:
    """A line that includes `cuda/NAME.cuh`, or its text where it is not a file, as in an archive.

    MLX hashes the text of a kernel at every launch: on an H200's host a launch took 5.7 µs with
    the whole source of `mma` in it, 3.3 with this line.

    >>> cuda_source("tensor_cores").startswith("#include")
    True
    """
    source = resources.files("qgraph.kernels") / "cuda" / f"{name}.cuh"
    path = Path(str(source))
    return f'#include "{path}"\n' if path.is_file() else source.read_text()
