"""A region's phases as the source of one kernel; its parts are in `kernels/cuda/phases.cuh`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ....kernels.cuda.arch import shared_memory
from ....kernels.cuda.kernel import bounded
from ....kernels.matmul.tiled.source import MODES
from ..unknown import Unknown
from .attention import THREADS, Attention
from .expressions import FLOATS, TYPES, Leaf
from .finishing import finished
from .layout import HEAD, Layout, OfProduct, laid_out, rows_of_x, rows_together
from .loading import Loader, rows_written
from .peers import HALF
from .pick import Pick
from .routing import Router
from .stages import Phase, Stages

APART = 128
"""Bytes at multiples of which the arrays begin that only a region uses."""


@dataclass(frozen=True)
class Source:
    """A kernel's text.

    Attributes:
        inputs, outputs: names of its arguments.  `counters` are those of the barrier; `last` is
            there so that launches wait for one another, and is not read; `done`, which the next
            launch gets as that, holds the arrays that only this one uses; `places` are those of the
            memory that the ranks of a mesh share, where sums over them are taken.
        shared_memory: bytes.
        room: bytes of `done`.
    """

    text: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shared_memory: int
    room: int


def written(stages: Stages, blocks: int, arch: str, ranks: int = 1) -> Source:
    """The kernel of a region for so many blocks on each of so many ranks.

    Raises:
        Unknown: its rows do not fit in shared memory, or its sums in that of the ranks.
    """
    if stages.addends * ranks > HALF:
        raise Unknown(f"sums of {stages.addends} bytes over {ranks} ranks")
    layout = laid_out(stages, blocks, shared_memory(arch) - 1024)
    addresses, room = _addresses(stages)
    lines = [
        "using namespace qgraph::phases;",
        *addresses,
        "char* memory = block_memory();",
        "Grid grid{const_cast<unsigned*>(counters), reinterpret_cast<int*>(memory)};",
        *([f"Peers<{ranks}> peers(places);"] if stages.addends else []),
        f"float* scratch = reinterpret_cast<float*>(memory + {HEAD});",
        f"float* sums = reinterpret_cast<float*>(memory + {layout.work});",
        "if (threadIdx.x == 0) *grid.open = 0;",
    ]
    first = int(isinstance(stages.phases[0], Attention))
    if first:  # all wait for it, and it wants the registers of what comes after it
        lines.append("char* memory_of_attention = reinterpret_cast<char*>(sums);")
        lines += _phase(stages, layout, 0, ranks)
    lines.append(
        f"Ring<{layout.slot}, {layout.slots}, {layout.flight}> ring(memory + {layout.ring});"
    )
    lines += _arrays_of(stages.routers, layout.work, layout.kept)
    for i, phase in stages.products.items():
        product, chosen = _product(phase, stages.rows, layout.products[i]), ""
        if phase.by is not None:
            chosen = f", {{reinterpret_cast<const int*>({phase.by.chosen})}}"
        lines.append(f"{product} p{i}({phase.weight}, {phase.scales}{chosen});")
    lines.append(f"ring.fill({_fetch(stages, 0, done=-1)});")
    for i in range(first, len(stages.phases)):
        lines += _phase(stages, layout, i, ranks)
    late = [row for row in stages.written if row.phase >= len(stages.phases)]
    if late:
        barrier = _barrier(stages.phases[-1])
        lines += [f"{barrier}.arrive();", _waits(barrier, "[] {}")]
        lines += rows_written(stages, late, ranks)
    lines.append("if (grid.leave()) peers.leave();" if stages.addends else "grid.leave();")
    own = ("places", "counters", "last") if stages.addends else ("counters", "last")
    inputs, outputs = (*stages.inputs.values(), *own), (*dict.fromkeys(stages.results), "done")
    return Source("\n".join(lines), inputs, outputs, layout.size, room)


def _addresses(stages: Stages) -> tuple[list[str], int]:
    """Where the arrays are that are no argument of the kernel, and how many bytes `done` has."""
    lines = []
    for name, (whole, start) in stages.within.items():
        const = "" if whole in stages.arrays else "const "
        lines.append(f"{const}auto* {name} = {whole} + {start};")
    room = 0
    for name, (shape, dtype) in stages.arrays.items():
        if name in stages.results or name in stages.within:
            continue
        lines.append(f"auto* {name} = reinterpret_cast<{TYPES[dtype]}*>(done + {room // 4});")
        room += -(-math.prod(shape) * dtype.size // APART) * APART
    return lines, max(room, APART)


def _arrays_of(routers: Sequence[Router], passing: int, kept: int) -> Iterator[str]:
    """Arrays of routers in shared memory: where rows of x will be, or beside them."""
    for router in routers:
        at = {False: passing, True: kept}
        for array, is_kept in router.arrays.items():
            type = "float" if array.dtype in FLOATS else "int"
            place = f"reinterpret_cast<{type}*>(memory + {at[is_kept]})"
            yield f"{type}* {array.name} = {place};"
            at[is_kept] += router.size(array)
        kept = at[True]


def _fetch(stages: Stages, first: int, done: int) -> str:
    """Begins to copy the next piece of the first of some products that has any left.

    Args:
        first: of the products.
        done: the last phase before which all routers are done: products by experts that wait for a
            later one are not known.
    """
    waits = [router.before for router in stages.routers if router.before > done]
    products = [i for i in stages.products if first <= i < min(waits, default=len(stages.phases))]
    if not products:
        return "[] { return false; }"
    pieces = " || ".join(f"p{i}.fetch(ring.free())" for i in products)
    return f"[&] {{ if (!({pieces})) return false; ring.begun(); return true; }}"


def _product(phase: Phase, rows: int, own: OfProduct) -> str:
    p = phase.problem
    mode = f"qgraph::tiled::Mode({MODES.index(p.mode)})"
    together = rows_together(phase, rows)
    numbers = (p.bits, p.group_size, together, p.k, phase.width, phase.parts, own.units, own.piece)
    which = "" if phase.by is None else f", {phase.by.text}"
    return f"Product<{TYPES[p.dtype]}, {mode}, {', '.join(map(str, numbers))}{which}>"


def _barrier(before: Phase | Attention | Pick) -> str:
    """What lies between a phase and the next: a barrier over the grid, or those of all ranks."""
    return "peers" if isinstance(before, Phase) and before.is_summed else "grid"


def _waits(barrier: str, meanwhile: str) -> str:
    """Waits until all have arrived; at one over the grid, copies go on meanwhile."""
    return f"grid.wait({meanwhile});" if barrier == "grid" else "peers.wait();"


def _phase(stages: Stages, layout: Layout, i: int, ranks: int) -> Iterator[str]:
    phase = stages.phases[i]
    if isinstance(phase, Attention):
        rows = [row for row in stages.written if row.phase == i]
        yield from rows_written(stages, rows, ranks)
        yield from phase.text()
        return
    if isinstance(phase, Pick):
        yield f"{_barrier(stages.phases[i - 1])}.arrive();"
        yield _waits(_barrier(stages.phases[i - 1]), "[] {}")
        yield from rows_written(stages, [row for row in stages.written if row.phase == i], ranks)
        yield from phase.text(stages.rows)
        return
    p, x = phase.problem, f"x{i}"
    if i:
        yield f"{_barrier(stages.phases[i - 1])}.arrive();"
    loader = Loader(phase.x, p.k, stages.rows, i, ranks)
    count = rows_of_x(phase, stages.rows)
    if count == stages.rows:
        yield from loader.early()
    if i:
        before = _fetch(stages, i, done=i - 1)
        yield _waits(_barrier(stages.phases[i - 1]), f"[&] {{ ring.fill({before}); }}")
    yield from rows_written(stages, [row for row in stages.written if row.phase == i], ranks)
    fetch = _fetch(stages, i, done=i)
    yield from _routed(stages, i, fetch)
    yield f"const Rows<{TYPES[p.dtype]}, {p.k}> {x}{{memory + {layout.products[i].rows}}};"
    if count == stages.rows:
        yield from loader.rows(f"{x}.put(n, k, made);")
    else:
        assert isinstance(phase.x, Leaf)
        yield f"{x}.copy<{count}>({phase.x.name});"
    yield f"{x}.fill<{count}>();"
    yield "__syncthreads();"
    yield from finished(phase, i, x, fetch, ranks)


def _routed(stages: Stages, i: int, fetch: str) -> Iterator[str]:
    """Routers that are done before a phase; then the weights of experts may be fetched."""
    for router in stages.routers:
        if router.before == i:
            yield from router.text()
            yield f"ring.fill({fetch});"


def declared(name: str, source: Source, dtypes: Callable[[str], mx.Dtype]) -> str:
    """A declaration of MLX's kernel: a block has a multiprocessor to itself."""
    inputs = [f"const {TYPES[dtypes(n)]}*" for n in source.inputs]
    outputs = [f"{TYPES[dtypes(n)]}*" for n in source.outputs]
    return bounded(name, ", ".join([*inputs, *outputs]), THREADS)
