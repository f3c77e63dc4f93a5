"""`tiled`: on CUDA, a kernel of our own for any number of rows, on a weight laid out in tiles.

Products of some rows are far from the tensor cores' speed in MLX 0.32: its format makes them decode
with many small reads, and it decodes the weight again for every 16 rows.  Here the weight is laid
out once, when it is packed, as the tensor cores want it (`layout.py`); the source is
`product.cuh`, and `docs/decisions/0014-a-weight-laid-out-in-tiles.md` says what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ...base import HALF, Kernel, Machine, Packed, Problem, Streams
from ...cuda.arch import capability, without_tensor_cores
from .blocks import block, microseconds, tiles
from .layout import TILE, padded
from .source import MODES, add_parts, product, take_rows, template
from .untiled import LAYOUT, Untiled, in_tiles

CONTRACT = "the weight is rounded to the dtype of x, sums are float32 in another order"


class Tiled(Kernel):
    name = "tiled"
    backends = ("cuda",)
    layout = LAYOUT
    gives_rows = True
    mlx_form = Untiled.name

    def applies(self, problem: Problem) -> str | None:
        p = problem
        if why := without_tensor_cores(p.backend, p.arch):
            return why
        if p.dtype not in HALF or p.scales_dtype not in (p.dtype, mx.uint8):
            return "takes half precision, scales in the dtype of x"
        if not p.transpose:
            return "takes a transposed weight"
        return None

    def contract(self, problem: Problem) -> str:
        return CONTRACT

    def extra_bytes(self, problem: Problem) -> int:
        """What fills tiles up: all plans of a program read the weight in tiles."""
        p = problem.replace(n=padded(problem.n), k=padded(problem.k))
        return p.packed_bytes - problem.packed_bytes

    def free_bytes(self, problem: Problem) -> float:
        """A row of tiles at least, so that a router's few rows are no launch of their own."""
        row = problem.replace(n=TILE, k=padded(problem.k), experts=0)
        return max(super().free_bytes(problem), row.packed_bytes)

    def interpolated(self, problem: Problem, machine: Machine) -> float | None:
        """Not by others where there is a model: how a product is cut up changes in steps."""
        known = capability(problem.arch) == 90
        return None if known else super().interpolated(problem, machine)

    def modelled(self, problem: Problem) -> float | None:
        """By the time of a stage or of reading the weight, as measured on an H100."""
        return microseconds(block(problem), problem) if capability(problem.arch) == 90 else None

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        return in_tiles(parts, problem)

    def take_rows(self, packed: Sequence[mx.array], indices: mx.array, problem: Problem) -> Packed:
        p, rows = problem, indices.astype(mx.int32)
        groups = (*rows.shape, p.k // p.group_size)
        affine = p.mode == "affine"
        made: list[mx.array] = take_rows(affine)(
            inputs=[*packed, rows],
            template=[
                ("MODE", MODES.index(p.mode)),
                ("BITS", p.bits),
                ("GROUP", p.group_size),
                ("N", p.n),
                ("K", p.k),
            ],
            grid=(-(-p.k // 32 // 128) * 128, rows.size, 1),
            threadgroup=(128, 1, 1),
            output_shapes=[(*rows.shape, p.k * p.bits // 32), *[groups] * (1 + affine)],
            output_dtypes=[mx.uint32, *[p.scales_dtype] * (1 + affine)],
        )
        return tuple(made)

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        p, b = problem, block(problem)
        size = (p.m, p.n)
        results: list[mx.array] = product(b.shared_memory(p))(
            inputs=[x, *packed],
            template=[*template(p, b), ("PARTS", b.parts > 1)],
            grid=(-(-p.m // b.columns) * b.threads, -(-tiles(p.n) // b.rows), b.parts),
            threadgroup=(b.threads, 1, 1),
            output_shapes=[size if b.parts == 1 else (b.parts, *size)],
            output_dtypes=[p.dtype if b.parts == 1 else mx.float32],
        )
        if b.parts > 1:
            results = add_parts()(
                inputs=results,
                template=[("T", p.dtype)],
                grid=(-(-p.m * p.n // 4), 1, 1),
                threadgroup=(256, 1, 1),
                output_shapes=[size],
                output_dtypes=[p.dtype],
            )
        return results[0]
