"""The CUDA sources of `cuda/`, as `mx.fast.cuda_kernel` takes them."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources


@cache
def cuda_source(name: str) -> str:
    """`cuda/NAME.cuh` without comments and indentation: MLX hashes the text at every launch.

    >>> "//" in cuda_source("tensor_cores")
    False
    """
    text = (resources.files("qgraph.kernels") / "cuda" / f"{name}.cuh").read_text()
    lines = (re.sub(r"//.*", "", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)
