"""`mma`: on CUDA, a kernel of our own for few rows, which decodes each weight once.

MLX 0.32 decodes the weight again for each row below 8 rows, and its tiles of 16 rows are far from
the memory's speed.  This one multiplies on tensor cores, in tiles of 8 rows of x, and sums in
float32; the source is `cuda/tensor_cores.cuh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from ..base import HALF, Kernel, Problem, Streams
from ..cuda.arch import capability, without_tensor_cores
from ..cuda.kernel import CudaKernel
from ..cuda.source import cuda_source
from .plain import Plain

MOST_ROWS = 32
START_US = 2.0
BYTES = 1.75e6
"""Microseconds before the first byte, and packed bytes a microsecond up to 8 rows: of 4 bits
2048×2048 in 9 µs, 14336×4096 in 27 (one H200, mlx 0.32.4), some 5 of which were the host's."""
ROWS = 16
"""Of the weight, in a block; 32 were measured to be slower on an H200."""
STRIDE = {4: 160, 8: 192}
"""Bytes in shared memory between rows of the weight, by bits; as in the source."""


class TensorCores(Kernel):
    name = "mma"
    backends = ("cuda",)
    mlx_form = Plain.name

    @classmethod
    def tried(cls, problem: Problem) -> Sequence[str]:
        """Not where `tiled` is known to be as fast: plans for one and for many rows then read one
        copy of the weight."""
        return [] if capability(problem.arch) == 90 else [cls.name]

    def applies(self, problem: Problem) -> str | None:
        p = problem
        if why := without_tensor_cores(p.backend, p.arch):
            return why
        if p.mode != "affine" or p.bits not in (4, 8) or not p.transpose:
            return "takes affine weights of 4 or 8 bits, transposed"
        if p.dtype not in HALF or p.scales_dtype != p.dtype:
            return "takes half precision, scales in the dtype of x"
        if p.m > MOST_ROWS:
            return f"takes up to {MOST_ROWS} rows"
        return None

    def contract(self, problem: Problem) -> str:
        return "sums in float32 in another order"

    def modelled(self, problem: Problem) -> float | None:
        if problem.backend != "cuda":
            return None
        tiles = -(-problem.m // 8)
        return START_US + problem.packed_bytes / BYTES * (0.5 + 0.5 * tiles)

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        p, (warps, stages) = problem, _block(problem)
        results: list[mx.array] = _few_rows(warps * stages * ROWS * STRIDE[p.bits])(
            inputs=[x, *packed],
            template=[
                ("T", p.dtype),
                ("BITS", p.bits),
                ("GROUP", p.group_size),
                ("COLUMNS", -(-p.m // 8)),
                ("TILES", ROWS // 16),
                ("WARPS", warps),
                ("STAGES", stages),
            ],
            grid=(-(-p.n // ROWS) * 32 * warps, 1, 1),
            threadgroup=(32 * warps, 1, 1),
            output_shapes=[(p.m, p.n)],
            output_dtypes=[p.dtype],
        )
        return results[0]


def _block(problem: Problem) -> tuple[int, int]:
    """Warps of a block and stages of a warp.

    Where blocks are too few to fill the GPU, they have more warps, which share the columns: on an
    H200 4096×14336 took 37 µs with 4 warps, 27 with 8, 24 with 16; 28672×4096 took 32, 34, 48.
    """
    columns = 1024 // problem.bits
    if problem.m > 8 or problem.n > 800 * ROWS:
        return 4, 4
    return (16, 2) if problem.k >= 32 * columns else (8, 2)


@cache
def _few_rows(shared_memory: int) -> CudaKernel:
    return CudaKernel(
        name="qgraph_few_rows",
        inputs=["x", "w", "scales", "biases"],
        outputs=["y"],
        header=cuda_source("cuda/words", "matmul/tensor_cores"),
        source="qgraph::few_rows<T, BITS, GROUP, COLUMNS, TILES, WARPS, STAGES>("
        "x, w, scales, biases, y, x_shape[0], w_shape[0], x_shape[1]);",
        shared_memory=shared_memory,
    )
