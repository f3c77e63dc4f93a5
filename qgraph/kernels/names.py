"""Kernels by name, and which ones are worth trying for a problem.

A name reads from the outside in: "shard2+f32+qmm" shards rows over two streams, computes each in
float32, by MLX's quantized matmul.  A new kernel is one small file and one row of `KERNELS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from .base import EXACT, NUMBER, Kernel, Problem, Wrapper
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
from .matmul.tiled.experts import TiledGather
from .matmul.tiled.product import Tiled
from .matmul.tiled.untiled import Untiled, UntiledGather

KERNELS: tuple[type[Kernel], ...] = (
    Plain,
    TensorCores,
    Tiled,
    Untiled,
    Padded,
    Chunked,
    Dequantized,
    Dense,
    Float32,
    Sharded,
    Simd,
    HostBlas,
    DenseHostBlas,
    Gather,
    SortedGather,
    TiledGather,
    UntiledGather,
    DequantizedGather,
    Float32Gather,
    GroupedSimd,
    GroupedHostBlas,
)
"""In the order in which they are tried: of those that take as long the first is chosen."""

_NAMED: dict[str, Callable[[], Kernel]] = {cls.name: cls for cls in KERNELS if cls.name}
_WRAPPERS: dict[str, Callable[..., Kernel]] = {
    cls.prefix: cls for cls in KERNELS if issubclass(cls, Wrapper)
}


@cache
def kernel(name: str) -> Kernel:
    """The kernel of a name.

    Raises:
        ValueError: there is none of that name; lists the parts a name may have.

    >>> kernel("shard2+f32+qmm").layout
    ('shard2', 'f32')
    """
    if name in _NAMED:
        return _NAMED[name]()
    first, _, rest = name.partition("+")
    for prefix, wrapper in _WRAPPERS.items():
        if rest and (found := re.fullmatch(prefix, first)):
            return wrapper(*map(int, found.groups()), kernel(rest))
    parts = ", ".join([*(p.replace(NUMBER, "8") + "+" for p in _WRAPPERS), *_NAMED])
    raise ValueError(f"no kernel is called {name!r}; a name is made of {parts}")


def plain(problem: Problem) -> str:
    """MLX's own kernel for a problem.

    >>> import mlx.core as mx
    >>> plain(Problem(1, 64, 64, mx.float32, "affine", 4, 64, experts=8))
    'gather_qmm'
    """
    return Gather.name if problem.experts else Plain.name


def names_to_try(problem: Problem) -> list[str]:
    """What may be best on the backend, MLX's own first; some need a budget or do not apply."""
    return [
        name
        for cls in KERNELS
        if problem.backend in cls.backends and cls.gathers == bool(problem.experts)
        for name in cls.tried(problem)
    ]


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
    if extra > max(budget, candidate.free_bytes(problem)):
        return f"keeps {extra} bytes more, the budget is {budget}"
    if exact and (contract := candidate.contract(problem)) != EXACT:
        return f"not exact: {contract}"
    return None


def candidates(problem: Problem, *, budget: int = 0, exact: bool = False) -> list[str]:
    """The kernels that may carry out a problem, MLX's own first."""
    names = names_to_try(problem)
    return [name for name in names if refusal(name, problem, budget=budget, exact=exact) is None]
