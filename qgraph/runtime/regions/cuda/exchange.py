"""Collectives of a mesh of GPUs over memory that they share, each a launch of its own.

NCCL's take 31 to 44 µs within the CUDA graphs that MLX collects launches in, and nothing orders two
of them there that depend on nothing of one another.  These take what the launch before gave, as
regions do, so what does not need them may run beside them.

How it goes, and what was measured, is in decision 0031; sums of two GPUs are pushed (0040).
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from ....kernels.cuda.kernel import CudaKernel, bounded
from ....kernels.cuda.source import cuda_source
from .expressions import FLOATS, TYPES
from .peers import BLOCKS, PARTS, PIECE, Peers
from .pushed import can_push, pushed

THREADS = 512

LARGEST = 64 << 20
"""Bytes that a kernel was timed with; what is more is NCCL's."""

TALKS = {"all_gather": "GATHER", "all_sum": "SUM", "all_max": "MAX", "all_min": "MIN",
         "sum_scatter": "SCATTER"}  # fmt: skip

_WORDS = {2: mx.uint16, 4: mx.uint32, 8: mx.uint32}
"""As what numbers of so many bytes are gathered."""
_WORD_TYPES = {mx.uint16: "uint16_t", mx.uint32: "uint32_t"}


def can_exchange(op: str, x: mx.array | None) -> bool:
    """Is there a kernel for this collective of `x`, and is it for so much?

    >>> can_exchange("all_sum", mx.zeros(3)), can_exchange("all_sum", mx.arange(3))
    (True, False)
    """
    if op not in TALKS or x is None or not 0 < x.nbytes <= LARGEST:
        return False
    return x.itemsize in _WORDS if op == "all_gather" else x.dtype in FLOATS


def exchange(op: str, x: mx.array, peers: Peers, last: mx.array) -> tuple[mx.array, mx.array]:
    """What the collective gives, and what the next launch is given as `last`.

    Sums are added up in the order of ranks, so all find the same.
    """
    ranks = peers.ranks
    if op == "all_sum" and can_push(x, ranks):
        found, last = pushed(x, peers, last)
        return found, last
    if op == "all_sum" and ranks > 2 and x.size % ranks == 0 and x.nbytes > ranks * PIECE:
        # Each sends all it has to each other rank; so it sends but a part twice.
        part, last = exchange("sum_scatter", x.flatten(), peers, last)
        whole, last = exchange("all_gather", part, peers, last)
        return whole.reshape(x.shape), last
    flat = x.flatten()
    count, size, shape = flat.size, flat.size, x.shape
    if op == "all_gather":
        flat = flat.view(_WORDS[x.itemsize])
        count, size = flat.size, flat.size * ranks
        shape = (ranks * x.shape[0], *x.shape[1:]) if x.ndim else (ranks,)
    elif op == "sum_scatter":
        count = size = flat.size // ranks
        shape = (x.shape[0] // ranks, *x.shape[1:])
    each = PIECE // ranks // 16 * 16 if op == "sum_scatter" else PIECE
    blocks = min(BLOCKS, -(-count * flat.itemsize // each))
    found, last = _kernel(op, flat.dtype, ranks)(
        inputs=[flat, peers.places, last],
        grid=(blocks * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(size,), last.shape],
        output_dtypes=[flat.dtype, last.dtype],
    )
    return found.view(x.dtype).reshape(shape), last


@cache
def _kernel(op: str, dtype: mx.Dtype, ranks: int) -> CudaKernel:
    type = _WORD_TYPES.get(dtype) or TYPES[dtype]
    name = f"qgraph_{op}_{type}_{ranks}"
    arguments = (
        f"const {type}* x, const __grid_constant__ Shape x_shape, const uint64_t* places, "
        f"const uint32_t* last, {type}* found, uint32_t* done"
    )
    part = f"x_shape[0] / {ranks}" if op == "sum_scatter" else "x_shape[0]"
    return CudaKernel(
        name,
        ["x", "places", "last"],
        ["found", "done"],
        f"""
            using namespace qgraph::phases;
            talk<{TALKS[op]}, {type}, {ranks}>(places, x, found, {part});
        """,
        header=cuda_source(*PARTS, "cuda/exchange") + bounded(name, arguments, THREADS),
    )
