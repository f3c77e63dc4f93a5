"""How a product by `tiled` is cut up among blocks of threads, and what it takes then.

The model was fitted to an H100, to kernels that wait for one another, each on another weight: sizes
from 2048×2048 to 151936×896, 1 to 2048 rows.  Decision 0014 says how far it is from others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from ...base import Problem
from ...cuda.arch import capability, shared_memory
from ...cuda.rates import bandwidth
from .layout import TILE

SMS = 132
"""Multiprocessors of an H100 and of an H200."""


@dataclass(frozen=True, slots=True)
class Block:
    """How a product is cut up among blocks of threads.

    Attributes:
        rows: warpgroups along the rows of the weight, 64 each.
        split: warpgroups that share the columns of a stage.
        columns: rows of x.
        depth: columns of the weight in a stage.
        stages: in shared memory.
        step_us: what 64 columns of an affine weight take.
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
        return -(-p.m // self.columns) * -(-tiles(p.n) // self.rows)


BLOCKS = (
    Block(1, 2, 8, 256, 6, 0.108),
    Block(1, 4, 8, 512, 6, 0.078),
    Block(2, 2, 16, 256, 5, 0.175),
    Block(1, 2, 16, 256, 6, 0.118),
    Block(1, 4, 16, 512, 5, 0.094),
    Block(1, 2, 32, 256, 4, 0.125),
    Block(2, 2, 32, 256, 4, 0.20),
    Block(2, 1, 64, 128, 4, 0.30),
    Block(2, 1, 96, 128, 4, 0.40),
    Block(2, 1, 128, 128, 4, 0.43),
    Block(4, 1, 128, 64, 5, 0.76),
    Block(2, 1, 192, 64, 6, 0.59),
    Block(2, 1, 256, 64, 5, 0.75),
)
"""Those that were fastest for some size on an H100, of some 100; of equals the first is taken."""
DECODING_US = {"affine": 0.0, "mxfp8": 0.02, "mxfp4": 0.03, "nvfp4": 0.045}
"""What 64 by 64 numbers take longer to decode than affine ones."""
PARTS = (1, 2, 3, 4, 6, 8)
START_US = 3.5
RAMP_US = 1.3
"""Before the first byte and after the last, and between waves of blocks."""
OVERLAP = 0.8
"""Of the time of blocks one after the other, where two share a multiprocessor."""
CACHED = 6.3e6
"""Bytes a microsecond of what blocks read again from the cache."""
WARM = 5.0e9
"""Operations that take a microsecond more than blocks do by themselves: many of them bring the GPU
to its limit of power, and its clock down, from 1980 MHz to 1860 and less."""
PARTS_US = 2.5
SUMMED = 1.0e7
"""To add parts up: the launch, and their bytes a microsecond, written and read in the cache."""


@cache
def block(p: Problem) -> Block:
    """How a product is cut up: in the way that the model takes for the fastest."""
    narrow = (b for b in BLOCKS if b.columns < 2 * max(p.m, BLOCKS[0].columns))
    fitting = [b for b in (_fitted(b, p) for b in narrow) if b is not None]
    cuts = [replace(b, parts=n) for b in fitting for n in PARTS if n == 1 or _may_part(b, n, p)]
    return min(cuts, key=lambda b: microseconds(b, p))


def _may_part(b: Block, parts: int, p: Problem) -> bool:
    """Are there two stages a part, and do warpgroups not share the columns of a block already?"""
    return b.split < 4 and p.k >= 2 * parts * b.depth


def microseconds(b: Block, p: Problem) -> float:
    """Microseconds of a product: to read from memory, or from the cache, or the work of blocks."""
    blocks = b.count(p) * b.parts
    rounds = -(-blocks // SMS)
    together = max(1, shared_memory(p.arch) // b.shared_memory(p))
    overlap = OVERLAP if min(rounds, together) > 1 else 1.0
    step = b.step_us + b.rows * DECODING_US[p.mode]
    work = rounds * overlap * step * -(-p.k // (TILE * b.parts))
    again = b.count(p) * (b.rows * TILE * p.bits // 8 + 2 * b.columns) * p.k / CACHED
    added = 0.0 if b.parts == 1 else PARTS_US + 8 * b.parts * p.m * p.n / SUMMED
    ramps = START_US + RAMP_US * ((rounds - 1) // together)
    return ramps + max(p.moved_bytes / bandwidth(p.arch), again, work) + added + p.flops / WARM


def _fitted(b: Block, p: Problem) -> Block | None:
    """A block with as many stages as the GPU has shared memory for; None if those are too few."""
    if capability(p.arch) != 90 and b.columns > 64:
        return None  # what mma.sync reads of x takes registers too
    stages = min(b.stages, shared_memory(p.arch) // b.stage_bytes(p))
    return replace(b, stages=stages) if stages >= 3 else None


def tiles(n: int) -> int:
    """Tiles that hold N or K."""
    return -(-n // TILE)
