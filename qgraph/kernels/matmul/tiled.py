"""`tiled`: on CUDA, a kernel of our own for any number of rows, on a weight laid out in tiles.

Products of some rows are far from the tensor cores' speed in MLX 0.32: its format makes them decode
with many small reads, and it decodes the weight again for every 16 rows.  Here the weight is laid
out once, when it is packed, as the tensor cores want it (`tile_layout.py`); the source is
`tiled.cuh`, and `docs/decisions/0014-a-weight-laid-out-in-tiles.md` says what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx

from ..base import HALF, Kernel, Machine, Packed, Problem, Streams
from ..cuda.arch import capability
from ..cuda.source import cuda_source
from .gather import Gather, Indices, broadcast_indices
from .tile_layout import TILE, padded
from .tiled_blocks import READ, START_US, Block, block, microseconds, tiles
from .untiled import LAYOUT, Untiled, UntiledGather, in_tiles

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
"""In the order of the source."""
SOURCES = ("tiled_instructions", "tiled_formats", "tiled")
CONTRACT = "the weight is rounded to the dtype of x, sums are float32 in another order"


SORT_US = 4.0
"""Grouping rows by expert."""


class Tiled(Kernel):
    name = "tiled"
    backends = ("cuda",)
    layout = LAYOUT
    gives_rows = True
    mlx_form = Untiled.name

    def applies(self, problem: Problem) -> str | None:
        p = problem
        if p.backend != "cuda":
            return "written for CUDA"
        if capability(p.arch) < 80:
            return f"tensor cores for bfloat16 begin with sm_80, this is {p.arch}"
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

    def modelled(self, problem: Problem) -> float | None:
        """By the time of a stage or of reading the weight, as measured on an H100."""
        return microseconds(block(problem), problem) if capability(problem.arch) == 90 else None

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        return in_tiles(parts, problem)

    def take_rows(self, packed: Sequence[mx.array], indices: mx.array, problem: Problem) -> Packed:
        p, rows = problem, indices.astype(mx.int32)
        groups = (*rows.shape, p.k // p.group_size)
        affine = p.mode == "affine"
        made: list[mx.array] = _take_rows(affine)(
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
        results: list[mx.array] = _product(b.shared_memory(p))(
            inputs=[x, *packed],
            template=[*_template(p, b), ("PARTS", b.parts > 1)],
            grid=(-(-p.m // b.columns) * b.threads, -(-tiles(p.n) // b.rows), b.parts),
            threadgroup=(b.threads, 1, 1),
            output_shapes=[size if b.parts == 1 else (b.parts, *size)],
            output_dtypes=[p.dtype if b.parts == 1 else mx.float32],
        )
        if b.parts > 1:
            results = _add_parts()(
                inputs=results,
                template=[("T", p.dtype)],
                grid=(-(-p.m * p.n // 4), 1, 1),
                threadgroup=(256, 1, 1),
                output_shapes=[size],
                output_dtypes=[p.dtype],
            )
        return results[0]


class TiledGather(Gather):
    """All experts in one launch: rows sorted by expert, each read and written where it lies."""

    name = "group+tiled"
    backends = ("cuda",)
    left_to_mlx = False
    layout = LAYOUT
    mlx_form = UntiledGather.name

    def applies(self, problem: Problem) -> str | None:
        return Tiled().applies(problem) or super().applies(problem)

    def contract(self, problem: Problem) -> str:
        return CONTRACT

    def extra_bytes(self, problem: Problem) -> int:
        return Tiled().extra_bytes(problem)

    def estimate(self, problem: Problem, machine: Machine) -> float | None:
        if (us := machine.measured(self.name, problem)) is not None:
            return us
        if capability(problem.arch) != 90:
            return None
        b = _gathered_block(problem)
        # As many rows as if each portion were full.
        rows = _portions(problem, b) * b.columns
        steps = microseconds(b, problem.replace(m=rows, experts=0))
        return SORT_US + max(START_US + problem.moved_bytes / READ, steps)

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        return in_tiles(parts, problem)

    def run(
        self,
        x: mx.array,
        packed: Sequence[mx.array],
        problem: Problem,
        streams: Streams,
        lhs: Indices = None,
        rhs: Indices = None,
    ) -> mx.array:
        p, b, each = problem, _gathered_block(problem), x.shape[-2]
        lhs, rhs = broadcast_indices(x, problem, lhs, rhs)
        starts, in_x, in_y = _grouped_rows(lhs, rhs, each, p.experts)
        y: mx.array = _gathered_product(b.shared_memory(p))(
            inputs=[x.reshape(-1, p.k), *packed, starts, in_x, in_y],
            template=_template(p, b),
            grid=(_portions(p, b) * b.threads, -(-tiles(p.n) // b.rows), 1),
            threadgroup=(b.threads, 1, 1),
            output_shapes=[(p.m, p.n)],
            output_dtypes=[p.dtype],
        )[0]
        return y.reshape(*rhs.shape, each, p.n)


def _gathered_block(p: Problem) -> Block:
    """For twice the rows that an expert has on average, as they are not spread evenly."""
    return replace(block(p.replace(m=-(-2 * p.m // p.experts), experts=0)), parts=1)


def _portions(p: Problem, b: Block) -> int:
    """Into how many portions rows fall at most, where those of an expert begin a new one."""
    return -(-p.m // b.columns) + min(p.m, p.experts)


def _grouped_rows(lhs: mx.array, rhs: mx.array, each: int, experts: int) -> list[mx.array]:
    """Where rows of each expert begin in the order of experts, and where rows lie in x and in y.

    Args:
        each: rows of a matrix of x.
    """
    rows = rhs.size * each
    made: list[mx.array] = _group_rows(4 * (experts + 1))(
        inputs=[lhs.astype(mx.uint32).flatten(), rhs.astype(mx.uint32).flatten()],
        template=[("EACH", each), ("EXPERTS", experts)],
        grid=(1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(experts + 1,), (rows,), (rows,)],
        output_dtypes=[mx.int32, mx.uint32, mx.uint32],
    )
    return made


def _template(p: Problem, b: Block) -> list[tuple[str, Any]]:
    return [
        ("T", p.dtype),
        ("MODE", MODES.index(p.mode)),
        ("BITS", p.bits),
        ("GROUP", p.group_size),
        ("N", p.n if p.n % TILE else 0),
        ("WN", b.rows),
        ("WK", b.split),
        ("COLUMNS", b.columns),
        ("DEPTH", b.depth),
        ("STAGES", b.stages),
    ]


def _header() -> str:
    return "".join(cuda_source("matmul", name) for name in SOURCES)


_ARGUMENTS = "T, qgraph::tiled::Mode(MODE), BITS, GROUP, N, WN, WK, COLUMNS, DEPTH, STAGES"


def _kernel(
    name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, shared_memory: int = 0
) -> Any:
    return mx.fast.cuda_kernel(
        name=f"qgraph_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        header=_header(),
        source=f"qgraph::tiled::{source};",
        shared_memory=shared_memory,
    )


@cache
def _product(shared_memory: int) -> Any:
    call = f"product<{_ARGUMENTS}, PARTS>(x, w, scales, y, x_shape[0], x_shape[1], w_shape[0])"
    return _kernel("tiled", ["x", "w", "scales"], ["y"], call, shared_memory)


@cache
def _gathered_product(shared_memory: int) -> Any:
    inputs = ["x", "w", "scales", "starts", "in_x", "in_y"]
    call = (
        f"gathered_product<{_ARGUMENTS}>(x, w, scales, starts, {{in_x, in_y}}, y, x_shape[1], "
        "w_shape[1], w_shape[0])"
    )
    return _kernel("tiled_gather", inputs, ["y"], call, shared_memory)


@cache
def _group_rows(shared_memory: int) -> Any:
    call = "group_rows(lhs, rhs, starts, in_x, in_y, rhs_shape[0], EACH, EXPERTS)"
    return _kernel("group_rows", ["lhs", "rhs"], ["starts", "in_x", "in_y"], call, shared_memory)


@cache
def _take_rows(affine: bool) -> Any:
    outputs = ["w_rows", "s_rows", "b_rows"][: 2 + affine]
    call = (
        "take_rows<qgraph::tiled::Mode(MODE), BITS, GROUP>(w, scales, rows, w_rows, s_rows, "
        f"{outputs[-1]}, N, K)"
    )
    return _kernel("take_rows", ["w", "scales", "rows"], outputs, call)


@cache
def _add_parts() -> Any:
    call = "add_parts<T>(parts, y, parts_shape[0], size_t(parts_shape[1]) * parts_shape[2])"
    return _kernel("add_parts", ["parts"], ["y"], call)
