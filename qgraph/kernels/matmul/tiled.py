"""`tiled`: on CUDA, a kernel of our own for any number of rows, on a weight laid out in tiles.

Products of some rows are far from the tensor cores' speed in MLX 0.32: its format makes them decode
with many small reads, and it decodes the weight again for every 16 rows.  Here the weight is laid
out once, when it is packed, as the tensor cores want it (`tile_layout.py`); the source is
`tiled.cuh`, and `docs/decisions/0014-a-weight-laid-out-in-tiles.md` says what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx

from ..base import HALF, Kernel, Packed, Problem, Streams
from ..cuda.arch import capability, shared_memory
from ..cuda.source import cuda_source
from .gather import Gather, Indices, broadcast_indices
from .tile_layout import TILE, padded
from .untiled import LAYOUT, Untiled, UntiledGather, in_tiles

SMS = 132
"""Multiprocessors of an H100 and of an H200."""
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
"""In the order of the source."""
SOURCES = ("tiled_instructions", "tiled_formats", "tiled")
CONTRACT = "the weight is rounded to the dtype of x, sums are float32 in another order"


@dataclass(frozen=True, slots=True)
class Block:
    """How a product is cut up among blocks of threads.

    Attributes:
        rows: warpgroups along the rows of the weight, 64 each.
        split: warpgroups that share the columns of a stage.
        columns: rows of x.
        depth: columns of the weight in a stage.
        stages: in shared memory.
        step_us: what 64 columns of the weight take.
        parts: blocks that share the columns of the weight.
    """

    rows: int
    split: int
    columns: int
    depth: int
    stages: int
    step_us: float = 0.0
    parts: int = 1

    @property
    def threads(self) -> int:
        return 128 * self.rows * self.split

    def stage_bytes(self, p: Problem) -> int:
        """Shared memory of a stage."""
        groups = max(1, self.depth // p.group_size)
        scale = 4 if p.mode == "affine" else 1
        w = self.rows * (self.depth * TILE * p.bits // 8 + groups * TILE * scale)
        return self.columns * self.depth * 2 + w

    def shared_memory(self, p: Problem) -> int:
        return self.stages * self.stage_bytes(p)

    def count(self, p: Problem) -> int:
        """Blocks of one part."""
        return -(-p.m // self.columns) * -(-_tiles(p.n) // self.rows)


BLOCKS = (
    Block(1, 2, 8, 256, 6, 0.098),
    Block(1, 4, 8, 512, 6, 0.078),
    Block(2, 2, 16, 256, 5, 0.15),
    Block(1, 4, 16, 512, 5, 0.094),
    Block(2, 2, 32, 256, 4, 0.20),
    Block(2, 1, 64, 128, 4, 0.30),
    Block(2, 1, 128, 128, 4, 0.43),
    Block(2, 1, 192, 64, 6, 0.59),
    Block(2, 1, 256, 64, 5, 0.75),
)
"""Those that were fastest for some size on an H100, of some 40."""
PARTS = (1, 2, 3, 4, 6, 8)
START_US = 4.0
RAMP_US = 2.0
"""Before the first byte and after the last, and between waves of blocks."""
OVERLAP = 0.8
"""Of the time of blocks one after the other, where two share a multiprocessor."""
READ, CACHED = 2.8e6, 6.3e6
"""Bytes a microsecond: of what is read once, and of what blocks read again from the cache."""
PARTS_US = 4.0
SUMMED = 1.0e7
"""To add parts up: the launch, and their bytes a microsecond, written and read in the cache."""
SORT_US = 30.0
"""Sorting rows by expert: some small operations."""


class Tiled(Kernel):
    name = "tiled"
    backends = ("cuda",)
    layout = LAYOUT
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
        return _us(block(problem), problem) if capability(problem.arch) == 90 else None

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        return in_tiles(parts, problem)

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        p, b = problem, block(problem)
        size = (p.m, p.n)
        results: list[mx.array] = _product(b.shared_memory(p))(
            inputs=[x, *packed],
            template=[*_template(p, b), ("PARTS", b.parts > 1)],
            grid=(-(-p.m // b.columns) * b.threads, -(-_tiles(p.n) // b.rows), b.parts),
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

    def estimate(self, problem: Problem, machine: Any) -> float | None:
        if (us := machine.measured(self.name, problem)) is not None:
            return float(us)
        if capability(problem.arch) != 90:
            return None
        b = _gathered_block(problem)
        # As many rows as if each portion were full.
        rows = _portions(problem, b) * b.columns
        steps = _us(b, problem.replace(m=rows, experts=0))
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
        experts = rhs.flatten()
        order = mx.argsort(experts)
        first = mx.arange(p.experts + 1, dtype=mx.uint32)[:, None]
        starts = (experts < first).sum(axis=1) * each
        in_x, in_y = (_rows(i, each) for i in (lhs.flatten()[order], order))
        y: mx.array = _gathered_product(b.shared_memory(p))(
            inputs=[x.reshape(-1, p.k), *packed, starts, in_x, in_y],
            template=_template(p, b),
            grid=(_portions(p, b) * b.threads, -(-_tiles(p.n) // b.rows), 1),
            threadgroup=(b.threads, 1, 1),
            output_shapes=[(p.m, p.n)],
            output_dtypes=[p.dtype],
        )[0]
        return y.reshape(*rhs.shape, each, p.n)


@cache
def block(p: Problem) -> Block:
    """How a product is cut up: in the way that the model takes for the fastest."""
    narrow = (b for b in BLOCKS if b.columns < 2 * max(p.m, BLOCKS[0].columns))
    fitting = [b for b in (_fitted(b, p) for b in narrow) if b is not None]
    cuts = [replace(b, parts=n) for b in fitting for n in PARTS if n == 1 or p.k >= 2 * n * b.depth]
    return min(cuts, key=lambda b: _us(b, p))


def _us(b: Block, p: Problem) -> float:
    """Microseconds of a product: to read from memory, or from the cache, or the work of blocks."""
    blocks = b.count(p) * b.parts
    rounds = -(-blocks // SMS)
    together = max(1, shared_memory(p.arch) // b.shared_memory(p))
    overlap = OVERLAP if min(rounds, together) > 1 else 1.0
    work = rounds * overlap * b.step_us * -(-p.k // (TILE * b.parts))
    again = b.count(p) * (b.rows * TILE * p.bits // 8 + 2 * b.columns) * p.k / CACHED
    added = 0.0 if b.parts == 1 else PARTS_US + 8 * b.parts * p.m * p.n / SUMMED
    ramps = START_US + RAMP_US * ((rounds - 1) // together)
    return ramps + max(p.moved_bytes / READ, again, work) + added


def _fitted(b: Block, p: Problem) -> Block | None:
    """A block with as many stages as the GPU has shared memory for; None if those are too few."""
    if capability(p.arch) != 90 and b.columns > 64:
        return None  # what mma.sync reads of x takes registers too
    stages = min(b.stages, shared_memory(p.arch) // b.stage_bytes(p))
    return replace(b, stages=stages) if stages >= 3 else None


def _gathered_block(p: Problem) -> Block:
    """For twice the rows that an expert has on average, as they are not spread evenly."""
    return replace(block(p.replace(m=-(-2 * p.m // p.experts), experts=0)), parts=1)


def _portions(p: Problem, b: Block) -> int:
    """Into how many portions rows fall at most, where those of an expert begin a new one."""
    return -(-p.m // b.columns) + min(p.m, p.experts)


def _rows(matrices: mx.array, each: int) -> mx.array:
    """Rows of matrices of `each` rows."""
    if each == 1:
        return matrices.astype(mx.uint32)
    rows = matrices[:, None].astype(mx.uint32) * each + mx.arange(each, dtype=mx.uint32)
    return rows.flatten()


def _tiles(n: int) -> int:
    return -(-n // TILE)


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


@cache
def _product(shared_memory: int) -> Any:
    return mx.fast.cuda_kernel(
        name="qgraph_tiled",
        input_names=["x", "w", "scales"],
        output_names=["y"],
        header=_header(),
        source=f"qgraph::tiled::product<{_ARGUMENTS}, PARTS>(x, w, scales, y, x_shape[0], "
        "x_shape[1], w_shape[0]);",
        shared_memory=shared_memory,
    )


@cache
def _gathered_product(shared_memory: int) -> Any:
    return mx.fast.cuda_kernel(
        name="qgraph_tiled_gather",
        input_names=["x", "w", "scales", "starts", "in_x", "in_y"],
        output_names=["y"],
        header=_header(),
        source=f"qgraph::tiled::gathered_product<{_ARGUMENTS}>(x, w, scales, starts, {{in_x, in_y}}"
        ", y, x_shape[1], w_shape[1], w_shape[0]);",
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
