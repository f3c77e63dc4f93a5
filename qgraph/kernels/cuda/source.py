"""The CUDA sources beside their kernels, as `mx.fast.cuda_kernel` takes them."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from pathlib import Path


@cache
def cuda_source(*names: str) -> str:
    """Lines that include `kernels/NAME.cuh`, or their texts where they are no files.

    MLX hashes the text of a kernel at every launch: on an H200's host a launch took 5.7 µs with
    the whole source of `mma` in it, 3.3 with this line.  In an archive there is no file to include.

    >>> cuda_source("cuda/words", "matmul/tensor_cores").count("#include")
    2
    """
    texts = []
    for name in names:
        source = resources.files("qgraph.kernels").joinpath(*f"{name}.cuh".split("/"))
        path = Path(str(source))
        text = source.read_text()
        digest = hashlib.sha1(text.encode()).hexdigest()  # so that other texts are other kernels
        texts.append(f'#include "{path}"  // {digest[:12]}\n' if path.is_file() else text)
    return "".join(texts)
