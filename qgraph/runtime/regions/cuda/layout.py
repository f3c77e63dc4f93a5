"""What lies where in a block's shared memory while a region runs.

First what a block knows of the barrier over the grid, then numbers of its warps, then what a phase
works with (an attention, or the sums of a product and the rows of its x), what routers keep, and
last the ring of what is fetched ahead, which gets what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..unknown import Unknown
from .attention import WARPS, Attention
from .stages import Phase, Stages

MOST_SUMS = 32 << 10
"""Bytes of sums that are finished together."""
RINGS = 176 << 10
"""Bytes for what is fetched ahead, of all warps: some 23 MB of the blocks of an H100."""
FLIGHT = 48 << 10
"""Bytes that a block has under way at a time: 3 TB/s for a microsecond and more."""
HEAD = 16
"""Bytes for what a block knows of the barrier over the grid."""
LANDING = 8
"""Bytes of a barrier of each slot."""
LARGEST_PIECE = 2560
"""Bytes."""


@dataclass(frozen=True)
class OfProduct:
    """How a product uses the memory.

    Attributes:
        piece: neighbouring tiles that a warp takes at a time.
        units: whose sums are finished together.
        rows: where its rows of x begin.
    """

    piece: int
    units: int
    rows: int


@dataclass(frozen=True)
class Layout:
    """Where things begin, in bytes, and how large they are.

    Attributes:
        work: where a phase works.
        kept: where that begins which routers keep.
        ring: where what is fetched ahead begins: each warp's `slots` of `slot` bytes, `flight` of
            them under way at a time.
        size: of all.
        products: by the numbers of their phases.
    """

    work: int
    kept: int
    ring: int
    slot: int
    slots: int
    flight: int
    size: int
    products: dict[int, OfProduct]


def laid_out(stages: Stages, blocks: int, memory: int) -> Layout:
    """The layout of one of so many blocks, of so many bytes each.

    Raises:
        Unknown: there is no room for the rows of x.
    """
    for largest in (4, 2, 1):
        found = _with_pieces(stages, blocks, memory, largest)
        if found is not None:
            return found
    taken = max(_taken(phase, stages.rows) for phase in stages.products.values())
    raise Unknown(f"{taken} bytes of x do not fit in shared memory")


def rows_together(phase: Phase, rows: int) -> int:
    """Rows of x that are multiplied together."""
    return rows if phase.by is None else 1


def rows_of_x(phase: Phase, rows: int) -> int:
    return rows if phase.by is None or not phase.by.own else phase.by.pairs


def _with_pieces(stages: Stages, blocks: int, memory: int, largest: int) -> Layout | None:
    """The layout with pieces of so many tiles at most, if the ring then has room."""
    rows, products = stages.rows, stages.products
    pieces = {i: _piece(phase, blocks, largest) for i, phase in products.items()}
    slot = max(pieces[i] * _tile(phase) for i, phase in products.items())
    flight = max(2, -(-FLIGHT // WARPS // slot))
    each = WARPS * (slot + LANDING)

    work = HEAD + 4 * WARPS * rows
    keeping = sum(router.nbytes(kept=True) for router in stages.routers)
    most = memory - work - keeping - each * (flight + 1)
    sizes = [phase.shared_memory for phase in stages.phases if isinstance(phase, Attention)]
    sizes += [router.nbytes(kept=False) for router in stages.routers]
    own = {}
    for i, phase in products.items():
        taken, sums = _taken(phase, rows), _sums(phase, pieces[i], rows)
        left = min(MOST_SUMS, most - taken)
        units = max(1, min(_units(phase, blocks), left // sums))
        own[i] = OfProduct(pieces[i], units, work + units * sums)
        sizes.append(units * sums + taken)
    size = -(-max(sizes) // 16) * 16
    if size > most:
        return None
    kept = work + size
    ring = kept + keeping
    slots = min(RINGS, memory - ring) // each
    return Layout(work, kept, ring, slot, slots, flight, ring + each * slots, own)


def _taken(phase: Phase, rows: int) -> int:
    """Bytes of the rows of x, as `Rows` has them."""
    return rows_of_x(phase, rows) * (_tiles(phase) * 128 + 16)


def _sums(phase: Phase, piece: int, rows: int) -> int:
    """Bytes of a unit's sums, each of as many addends as the source has."""
    addends = min(WARPS, -(-_tiles(phase) // piece))
    return phase.parts * addends * rows_together(phase, rows) * 16 * 4


def _units(phase: Phase, blocks: int) -> int:
    """Up to how many a block has."""
    units = -(-phase.width // 16) * (1 if phase.by is None else phase.by.times)
    return -(-units // blocks)


def _tile(phase: Phase) -> int:
    """Bytes of 16 rows of a tile with their scales."""
    p = phase.problem
    return 128 * p.bits + 16 * (4 if p.mode == "affine" else 1) * max(1, 64 // p.group_size)


def _tiles(phase: Phase) -> int:
    """Of 64 columns each."""
    return -(-phase.problem.k // 64)


def _piece(phase: Phase, blocks: int, largest: int) -> int:
    """Neighbouring tiles that a warp takes at a time: many, if all warps have some then."""
    runs = _units(phase, blocks) * phase.parts
    for count in (4, 2):
        pieces = runs * -(-_tiles(phase) // count)
        if count <= largest and count * _tile(phase) <= LARGEST_PIECE and pieces >= WARPS:
            return count
    return 1
