"""What a kernel asks about the GPU it is compiled for."""

from __future__ import annotations

import re
from functools import cache

import mlx.core as mx


def capability(arch: str) -> int:
    """The compute capability in an architecture's name; 0 where there is no number.

    >>> capability("sm_90a"), capability("apple")
    (90, 0)
    """
    found = re.search(r"\d+", arch)
    return int(found.group()) if found else 0


def shared_memory(arch: str) -> int:
    """Bytes of shared memory that one block may have (CUDA C++ Programming Guide, appendix 20.1).

    >>> shared_memory("sm_90") // 1024
    227
    """
    known = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
    return known.get(capability(arch), 99) * 1024


def without_tensor_cores(backend: str, arch: str) -> str | None:
    """Why kernels of ours that use tensor cores cannot run there; None if they can.

    >>> without_tensor_cores("cuda", "sm_75")
    'tensor cores for bfloat16 begin with sm_80, this is sm_75'
    """
    if backend != "cuda":
        return "written for CUDA"
    if capability(arch) < 80:
        return f"tensor cores for bfloat16 begin with sm_80, this is {arch}"
    return None


@cache
def compiled_for() -> str:
    """What compilers call the GPU of this process, with all that it alone can do; "" for none."""
    if not mx.cuda.is_available():
        return ""
    arch = str(mx.device_info(mx.Device(mx.gpu, 0))["architecture"])
    return arch + "a" * (capability(arch) >= 90)
