"""Kernels by name, and which ones are worth trying for a problem.

A name reads from the outside in: "shard2+f32+qmm" shards rows over two streams, computes each in
float32, by MLX's quantized matmul.  A new kernel is one small file and one entry here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from .base import EXACT, HALF, Kernel, Problem
from .matmul.chunked import Chunked
from .matmul.dense import Dense
from .matmul.dequantized import Dequantized
from .matmul.float32 import Float32
from .matmul.gather import (
    DequantizedGather,
    Float32Gather,
    Gather,
    GroupedHostBlas,
    GroupedSimd,
    SortedGather,
)
from .matmul.host_blas import DenseHostBlas, HostBlas
from .matmul.padded import Padded
from .matmul.plain import Plain
from .matmul.sharded import Sharded
from .matmul.simd import Simd
from .matmul.tensor_cores import TensorCores

GATHERS = (Gather, SortedGather, DequantizedGather, Float32Gather, GroupedSimd, GroupedHostBlas)
BASES: dict[str, Callable[[], Kernel]] = {
    cls.name: cls
    for cls in (Plain, TensorCores, Dequantized, Dense, Simd, HostBlas, DenseHostBlas, *GATHERS)
}
PREFIXES: dict[str, Callable[[int, Kernel], Kernel]] = {
    "pad": Padded,
    "chunk": Chunked,
    "shard": Sharded,
    "f": lambda _, inner: Float32(inner),
}
FREE_SHARE = 0.5
"""Extra memory, as a share of the packed weight, that needs no budget: float32 scales."""


@cache
def kernel(name: str) -> Kernel:
    """The kernel of a name.

    Raises:
        ValueError: there is none of that name; lists the parts a name may have.

    >>> kernel("shard2+f32+qmm").layout
    ('shard2', 'f32')
    """
    if name in BASES:
        return BASES[name]()
    first, _, rest = name.partition("+")
    found = re.fullmatch(r"(pad|chunk|shard)([1-9]\d*)|(f)32", first)
    if not found or not rest:
        parts = ", ".join(["pad8+", "chunk4+", "shard2+", "f32+", *BASES])
        raise ValueError(f"no kernel is called {name!r}; a name is made of {parts}")
    prefix, number, f = found.groups()
    return PREFIXES[f or prefix](int(number or 32), kernel(rest))


def names_to_try(problem: Problem) -> list[str]:
    """What may be best on the backend, MLX's own first; some need a budget or do not apply."""
    if problem.experts:
        return [cls.name for cls in GATHERS]
    if problem.backend != "cpu":
        pads = [f"pad{rows}+qmm" for rows in (8, 16)]
        chunks = [f"chunk{rows}+qmm" for rows in (4, 8)]
        return ["qmm", "mma", *pads, *chunks, "dequantize+matmul", "dense"]
    half = problem.dtype in HALF or problem.scales_dtype in HALF
    wide = "f32+" if half else ""
    in_mlx = [wide + base for base in ("qmm", "dequantize+matmul", "dense")]
    shards = [f"shard{problem.cores}+{name}" for name in in_mlx] if problem.cores > 1 else []
    halves = [] if not half else ["dequantize+matmul"]
    names = ["qmm", *halves, *in_mlx, *shards, "simd", "host-blas", "dense+host-blas"]
    return list(dict.fromkeys(names))


def refusal(name: str, problem: Problem, *, budget: int = 0, exact: bool = False) -> str | None:
    """Why a kernel may not carry out a problem, or None.

    Args:
        budget: bytes beyond the packed weight that this product may keep.
        exact: only results that are those of `mx.quantized_matmul` bit for bit.

    >>> import mlx.core as mx
    >>> refusal("dense", Problem(1, 64, 64, mx.float32, "affine", 4, 64))
    'keeps 16384 bytes more, the budget is 0'
    """
    candidate = kernel(name)
    if (why := candidate.applies(problem)) is not None:
        return why
    extra = candidate.extra_bytes(problem)
    if extra > max(budget, FREE_SHARE * problem.packed_bytes):
        return f"keeps {extra} bytes more, the budget is {budget}"
    if exact and (contract := candidate.contract(problem)) != EXACT:
        return f"not exact: {contract}"
    return None


def candidates(problem: Problem, *, budget: int = 0, exact: bool = False) -> list[str]:
    """The kernels that may carry out a problem, MLX's own first."""
    names = names_to_try(problem)
    return [name for name in names if refusal(name, problem, budget=budget, exact=exact) is None]
