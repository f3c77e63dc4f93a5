"""`tiled`: on CUDA, a kernel of our own for any number of rows, on a weight laid out in tiles.

The layout is `tile_layout.py`, the source `tiled.cuh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from qgraph.kernels.base import HALF, Kernel, Packed, Problem, Streams
from qgraph.kernels.tensor_cores import _capability

from .tile_layout import TILE, tiled_scales, tiled_weight

SMS = 132
"""Multiprocessors of an H100 and of an H200."""


@dataclass(frozen=True)
class Block:
    """How the work of a product is cut up; see the source."""

    rows: int
    split: int
    columns: int
    depth: int
    stages: int
    batch: int
    parts: int = 1
    tiles: int = 1

    @property
    def threads(self) -> int:
        return 128 * self.rows * self.split

    def shared_memory(self, p: Problem) -> int:
        scale = 4 if p.mode == "affine" else 1
        groups = max(1, self.depth // p.group_size)
        x = self.columns * self.depth * 2
        rows = self.rows * self.tiles
        w = rows * self.depth // TILE * 512 * p.bits
        return self.stages * (x + w + rows * groups * TILE * scale)


BLOCKS = {
    8: Block(2, 1, 8, 128, 8, 4),
    16: Block(2, 1, 16, 128, 8, 4),
    32: Block(2, 1, 32, 128, 6, 4),
    64: Block(2, 1, 64, 128, 4, 4),
    128: Block(2, 1, 128, 64, 5, 2),
    256: Block(2, 1, 256, 64, 5, 2),
}


class Tiled(Kernel):
    name = "tiled"
    layout = ("tiled",)

    def applies(self, problem: Problem) -> str | None:
        p = problem
        if p.backend != "cuda":
            return "written for CUDA"
        if _capability(p.arch) < 80:
            return f"tensor cores for bfloat16 begin with sm_80, this is {p.arch}"
        if p.dtype not in HALF or p.out_dtype != p.dtype:
            return "takes half precision, scales in the dtype of x"
        if not p.transpose:
            return "takes a transposed weight"
        return None

    def contract(self, problem: Problem) -> str:
        return "sums in float32 in another order"

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        w, *scales = parts
        per_tile = max(1, TILE // problem.group_size)
        fill = -scales[0].shape[-1] % per_tile
        scales = [mx.pad(s, [(0, 0)] * (s.ndim - 1) + [(0, fill)]) for s in scales]
        return tiled_weight(w, problem.bits), tiled_scales(scales)

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        return product(x, packed, problem, block(problem))


def block(p: Problem) -> Block:
    return next((b for c, b in BLOCKS.items() if p.m <= c), BLOCKS[256])


def product(x: mx.array, packed: Sequence[mx.array], p: Problem, b: Block) -> mx.array:
    tiles = -(-p.n // TILE)
    grid = (-(-p.m // b.columns), -(-tiles // (b.rows * b.tiles)), b.parts)
    out = (p.m, p.n) if b.parts == 1 else (b.parts, p.m, p.n)
    dtype = p.dtype if b.parts == 1 else mx.float32
    (y,) = _product(b.shared_memory(p))(
        inputs=[x, *packed],
        template=[
            ("T", p.dtype),
            ("MODE", ["affine", "mxfp4", "nvfp4", "mxfp8"].index(p.mode)),
            ("BITS", p.bits),
            ("GROUP", p.group_size),
            ("N", p.n if p.n % TILE else 0),
            ("WN", b.rows),
            ("WK", b.split),
            ("MT", b.tiles),
            ("COLUMNS", b.columns),
            ("DEPTH", b.depth),
            ("STAGES", b.stages),
            ("BATCH", b.batch),
            ("PARTS", b.parts),
        ],
        grid=(grid[0] * b.threads, grid[1], grid[2]),
        threadgroup=(b.threads, 1, 1),
        output_shapes=[out],
        output_dtypes=[dtype],
    )
    if b.parts == 1:
        return y
    size = p.m * p.n
    return _add_parts()(
        inputs=[y],
        template=[("T", p.dtype)],
        grid=(-(-size // 4), 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(p.m, p.n)],
        output_dtypes=[p.dtype],
    )[0]


def _header() -> str:
    import os
    from pathlib import Path
    if os.environ.get("QG_DEFS"):
        return "".join(f"#define {d}\n" for d in os.environ["QG_DEFS"].split(",")) + f'#include "{Path(__file__).parent / "tiled.cuh"}"\n'
    return f'#include "{Path(__file__).parent / "tiled.cuh"}"\n'


@cache
def _product(shared_memory: int) -> Any:
    return mx.fast.cuda_kernel(
        name=f"qgraph_tiled_{shared_memory}" + __import__("os").environ.get("QG_DEFS", ""),
        input_names=["x", "w", "scales"],
        output_names=["y"],
        header=_header(),
        source="qgraph::tiled::product<T, qgraph::tiled::Mode(MODE), BITS, GROUP, N, WN, WK, MT, COLUMNS,"
        " DEPTH, STAGES, BATCH, PARTS>(x, w, scales, y, x_shape[0], x_shape[1], w_shape[0]);",
        shared_memory=shared_memory,
    )


@cache
def _add_parts() -> Any:
    return mx.fast.cuda_kernel(
        name="qgraph_add_parts",
        input_names=["parts"],
        output_names=["y"],
        header=_header(),
        source="qgraph::tiled::add_parts<T>(parts, y, parts_shape[0],"
        " size_t(parts_shape[1]) * parts_shape[2]);",
    )
