"""A region's phases as the source of one kernel; its parts are in `kernels/cuda/phases.cuh`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ....kernels.cuda.arch import shared_memory
from ....kernels.matmul.tiled.source import MODES
from ..unknown import Unknown
from .attention import WARPS, Attention
from .experts import ByExpert
from .expressions import (
    FLOATS,
    TYPES,
    Added,
    Expression,
    Gathered,
    Leaf,
    Normed,
    Part,
    Routed,
    Summed,
    Text,
    in_order,
    literal,
)
from .peers import HALF
from .pick import Pick
from .routing import Router
from .stages import Phase, Row, Stages

THREADS = 32 * WARPS
MOST_SUMS = 32 << 10
"""Bytes of sums that are finished together."""
RINGS = 176 << 10
"""Bytes for what is fetched ahead, of all warps: some 23 MB of the blocks of an H100."""
FLIGHT = 48 << 10
"""Bytes that a block has under way at a time: 3 TB/s for a microsecond and more."""
HEAD = 16
"""Bytes of shared memory for what a block knows of the barrier over the grid."""
LANDING = 8
"""Bytes of a barrier of each slot."""
LARGEST_PIECE = 2560
"""Bytes."""
APART = 128
"""Bytes at multiples of which the arrays begin that only a region uses."""
EARLY = 2
"""Up to how many times eight columns of a thread are fetched before the barrier."""


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
    rows = stages.rows
    if stages.addends * ranks > HALF:
        raise Unknown(f"sums of {stages.addends} bytes over {ranks} ranks")
    products = stages.products
    taken = max(
        _rows_of_x(phase, rows) * _row_bytes(phase.problem.k) for phase in products.values()
    )
    pieces = {i: _piece(phase, blocks) for i, phase in products.items()}
    addends = {i: _sums(phase, pieces[i], rows) for i, phase in products.items()}
    fits = {i: _fits(phase, addends[i], blocks) for i, phase in products.items()}
    sums = max(fits[i] * addends[i] for i in products)
    scratch = 4 * WARPS * rows
    attentions = [phase for phase in stages.phases if isinstance(phase, Attention)]
    passing = [router.nbytes(kept=False) for router in stages.routers]
    work = max(sums + taken, *(a.shared_memory for a in attentions), *passing, 0)
    work = -(-work // 16) * 16
    kept = sum(router.nbytes(kept=True) for router in stages.routers)
    left = shared_memory(arch) - 1024 - HEAD - scratch - work - kept
    slot = max(pieces[i] * _tile(phase) for i, phase in products.items())
    flight = max(2, -(-FLIGHT // WARPS // slot))
    slots = min(RINGS, left) // WARPS // (slot + LANDING)
    if slots <= flight:
        raise Unknown(f"{taken} bytes of x do not fit in shared memory")
    addresses, room = _addresses(stages)
    lines = [
        "using namespace qgraph::phases;",
        *addresses,
        "char* memory = block_memory();",
        "Grid grid{const_cast<unsigned*>(counters), reinterpret_cast<int*>(memory)};",
        *([f"Peers<{ranks}> peers(places);"] if stages.addends else []),
        f"float* scratch = reinterpret_cast<float*>(memory + {HEAD});",
        f"float* sums = reinterpret_cast<float*>(memory + {HEAD + scratch});",
        f"char* rows = memory + {HEAD + scratch + sums};",
        "if (threadIdx.x == 0) *grid.open = 0;",
    ]
    if attentions:  # all wait for it, and it wants the registers of what comes after it
        lines.append("char* memory_of_attention = reinterpret_cast<char*>(sums);")
        lines += _phase(stages, stages.phases[0], 0, ranks)
    ring = HEAD + scratch + work + kept
    lines.append(f"Ring<{slot}, {slots}, {flight}> ring(memory + {ring});")
    lines += _arrays_of(stages.routers, HEAD + scratch, HEAD + scratch + work)
    for i, phase in products.items():
        product, chosen = _product(phase, rows, fits[i], pieces[i]), ""
        if phase.by is not None:
            chosen = f", {{reinterpret_cast<const int*>({phase.by.chosen})}}"
        lines.append(f"{product} p{i}({phase.weight}, {phase.scales}{chosen});")
    lines.append(f"ring.fill({_fetch(stages, 0, done=-1)});")
    for i in range(len(attentions), len(stages.phases)):
        lines += _phase(stages, stages.phases[i], i, ranks)
    late = [row for row in stages.written if row.phase >= len(stages.phases)]
    if late:
        barrier = _barrier(stages.phases[-1])
        lines += [f"{barrier}.arrive();", _waits(barrier, "[] {}")]
        lines += _rows_written(stages, late, ranks)
    lines.append("if (grid.leave()) peers.leave();" if stages.addends else "grid.leave();")
    size = HEAD + scratch + work + kept + WARPS * (slot + LANDING) * slots
    own = ("places", "counters", "last") if stages.addends else ("counters", "last")
    inputs, outputs = (*stages.inputs.values(), *own), (*dict.fromkeys(stages.results), "done")
    return Source("\n".join(lines), inputs, outputs, size, room)


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


def _row_bytes(k: int) -> int:
    return -(-k // 64) * 128 + 16  # as `Rows` has it


def _sums(phase: Phase, piece: int, rows: int) -> int:
    """Bytes of a unit's sums, each of as many addends as the source has."""
    addends = min(WARPS, -(-_tiles(phase) // piece))
    return phase.parts * addends * _together(phase, rows) * 16 * 4


def _together(phase: Phase, rows: int) -> int:
    """Rows of x that are multiplied together."""
    return rows if phase.by is None else 1


def _rows_of_x(phase: Phase, rows: int) -> int:
    return rows if phase.by is None or not phase.by.own else phase.by.pairs


def _units(phase: Phase, blocks: int) -> int:
    """Up to how many a block has."""
    units = -(-phase.width // 16) * (1 if phase.by is None else phase.by.times)
    return -(-units // blocks)


def _fits(phase: Phase, sums: int, blocks: int) -> int:
    """Units whose sums are finished together."""
    return max(1, min(_units(phase, blocks), MOST_SUMS // sums))


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


def _tile(phase: Phase) -> int:
    """Bytes of 16 rows of a tile with their scales."""
    p = phase.problem
    return 128 * p.bits + 16 * (4 if p.mode == "affine" else 1) * max(1, 64 // p.group_size)


def _tiles(phase: Phase) -> int:
    """Of 64 columns each."""
    return -(-phase.problem.k // 64)


def _piece(phase: Phase, blocks: int) -> int:
    """Neighbouring tiles that a warp takes at a time: many, if all warps have some then."""
    runs = _units(phase, blocks) * phase.parts
    for count in (4, 2):
        pieces = runs * -(-_tiles(phase) // count)
        if count * _tile(phase) <= LARGEST_PIECE and pieces >= WARPS:
            return count
    return 1


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


def _product(phase: Phase, rows: int, fits: int, piece: int) -> str:
    p = phase.problem
    mode = f"qgraph::tiled::Mode({MODES.index(p.mode)})"
    together = _together(phase, rows)
    numbers = (p.bits, p.group_size, together, p.k, phase.width, phase.parts, fits, piece)
    which = "" if phase.by is None else f", {phase.by.text}"
    return f"Product<{TYPES[p.dtype]}, {mode}, {', '.join(map(str, numbers))}{which}>"


def _barrier(before: Phase | Attention | Pick) -> str:
    """What lies between a phase and the next: a barrier over the grid, or those of all ranks."""
    return "peers" if isinstance(before, Phase) and before.is_summed else "grid"


def _waits(barrier: str, meanwhile: str) -> str:
    """Waits until all have arrived; at one over the grid, copies go on meanwhile."""
    return f"grid.wait({meanwhile});" if barrier == "grid" else "peers.wait();"


def _phase(stages: Stages, phase: Phase | Attention | Pick, i: int, ranks: int) -> Iterator[str]:
    if isinstance(phase, Attention):
        rows = [row for row in stages.written if row.phase == i]
        yield from _rows_written(stages, rows, ranks)
        yield from phase.text()
        return
    if isinstance(phase, Pick):
        yield f"{_barrier(stages.phases[i - 1])}.arrive();"
        yield _waits(_barrier(stages.phases[i - 1]), "[] {}")
        yield from _rows_written(stages, [row for row in stages.written if row.phase == i], ranks)
        yield from phase.text(stages.rows)
        return
    p, x = phase.problem, f"x{i}"
    if i:
        yield f"{_barrier(stages.phases[i - 1])}.arrive();"
    loader = _Loader(phase.x, p.k, stages.rows, i, ranks)
    count = _rows_of_x(phase, stages.rows)
    if count == stages.rows:
        yield from loader.early()
    if i:
        before = _fetch(stages, i, done=i - 1)
        yield _waits(_barrier(stages.phases[i - 1]), f"[&] {{ ring.fill({before}); }}")
    yield from _rows_written(stages, [row for row in stages.written if row.phase == i], ranks)
    fetch = _fetch(stages, i, done=i)
    yield from _routed(stages, i, fetch)
    yield f"const Rows<{TYPES[p.dtype]}, {p.k}> {x}{{rows}};"
    if count == stages.rows:
        yield from loader.rows(f"{x}.put(n, k, made);")
    else:
        assert isinstance(phase.x, Leaf)
        yield f"{x}.copy<{count}>({phase.x.name});"
    yield f"{x}.fill<{count}>();"
    yield "__syncthreads();"
    yield from _finished(phase, i, x, fetch, ranks)


def _routed(stages: Stages, i: int, fetch: str) -> Iterator[str]:
    """Routers that are done before a phase; then the weights of experts may be fetched."""
    for router in stages.routers:
        if router.before == i:
            yield from router.text()
            yield f"ring.fill({fetch});"


def _rows_written(stages: Stages, rows: Sequence[Row], ranks: int) -> Iterator[str]:
    """Written by the last block, which has the least to do."""
    for row in rows:
        loader = _Loader(row.expression, row.columns, stages.rows, f"_{row.into}", ranks)
        yield "if (blockIdx.x == gridDim.x - 1) {"
        yield from loader.early()
        yield from loader.rows(f"store_8({row.into} + n * {row.columns} + k, made);")
        yield "}"


# ---- Rows that are taken into shared memory


@dataclass
class _Loader:
    """Computes rows, eight columns of a thread at a time.

    Attributes:
        number: makes the names of its variables its own.
    """

    expression: Expression
    columns: int
    count: int
    number: int | str
    ranks: int
    names: dict[Leaf, str] = field(default_factory=dict)

    @property
    def turns(self) -> int:
        return -(-self.columns // (8 * THREADS))

    def early(self) -> Iterator[str]:
        """Fetches what was there before the region: it need not wait for the barrier."""
        for e in in_order(self.expression):
            if isinstance(e, Leaf) and e.after < 0 and self.turns <= EARLY:
                if e.columns and self.count > 1:
                    continue
                name = self.names[e] = f"early{self.number}_{len(self.names)}"
                yield f"Eight {name}[{self.turns}] = {{}};"
                yield from self._turn([f"{name}[v] = load_8({e.name} + {e.offset} + k);"])

    def rows(self, take: str) -> Iterator[str]:
        """`take` is what is done with `made`, columns k to k + 7 of row n."""
        norms: dict[Normed, tuple[str, str]] = {}
        for e in in_order(self.expression):
            if not isinstance(e, Normed):
                continue
            args, factor = f"args{self.number}_{len(norms)}", f"factor{self.number}_{len(norms)}"
            yield f"Eight {args}[{self.count}][{self.turns}];"
            yield f"float {factor}[{self.count}] = {{}};"
            into = f"{args}[n][v].v[e]"
            more = [f"{factor}[n] += {into} * {into};"]
            yield from self._all(self._elements(e.arg, norms, into, more))
            yield f"sum_over_block({factor}, scratch);"
            yield f"for (int n = 0; n < {self.count}; n++)"
            mean = f"{factor}[n] / {self.columns}.0f + {literal(e.eps)}"
            yield f"  {factor}[n] = rsqrtf({mean});"
            norms[e] = into, f"{factor}[n]"
        body = self._elements(self.expression, norms, "made.v[e]", [])
        yield from self._all(["Eight made;", *body, take])

    def _elements(
        self, e: Expression, norms: dict[Normed, tuple[str, str]], into: str, more: list[str]
    ) -> list[str]:
        loads: dict[Leaf, str] = {}

        def leaf(x: Leaf | Routed | Part) -> str:
            assert isinstance(x, Leaf)
            if x in self.names:
                return f"{self.names[x]}[v].v[e]"
            name = loads.setdefault(x, f"a{len(loads)}")
            return f"{name}.v[e]"

        text = Text(leaf, norms)
        result = text.write(e)
        fetched = [
            f"const Eight {name} = {_read(x, 'k', self.ranks, eight=True)};"
            for x, name in loads.items()
        ]
        inside = [*text.lines, f"{into} = {result};", *more]
        return [*fetched, "#pragma unroll", "for (int e = 0; e < 8; e++) {", *inside, "}"]

    def _all(self, body: list[str]) -> list[str]:
        rows = ["#pragma unroll", f"for (int n = 0; n < {self.count}; n++) {{"]
        return [*rows, *self._turn(body), "}"]

    def _turn(self, body: list[str]) -> list[str]:
        return [
            "#pragma unroll",
            f"for (int v = 0; v < {self.turns}; v++) {{",
            f"const int k = (v * {THREADS} + threadIdx.x) * 8;",
            f"if (k < {self.columns}) {{",
            *body,
            "}",
            "}",
        ]


def _read(x: Leaf, column: str, ranks: int, *, eight: bool = False) -> str:
    """Reads a number of row n, or eight from there on, that another block may have written."""
    place = f"n * {x.columns} + {x.offset} + {column}"
    if isinstance(x, Summed):
        name = "sum_8" if eight else "sum"
        return f"peers.{name}<{TYPES[x.dtype]}>({x.at * ranks}, {x.nbytes}, {place})"
    return f"load_8({x.name} + {place})" if eight else f"float(load_shared({x.name} + {place}))"


# ---- What becomes of a product's sums


def _finished(phase: Phase, i: int, x: str, fetch: str, ranks: int) -> Iterator[str]:
    """Leaves are fetched before the sums are there."""
    leaves: dict[Leaf, str] = {}
    by = phase.by

    def leaf(e: Leaf | Routed | Part) -> str:
        if isinstance(e, Added):
            assert by is not None
            text.lines += _added(e, by, name := f"all{len(text.lines)}")
            return name
        if isinstance(e, Part):
            return f"rounded<{TYPES[e.dtype]}>(y[{e.part}])"
        if isinstance(e, Routed):
            return f"{e.name}[n]"
        read = _read(e, "j", ranks)
        if isinstance(e, Gathered):
            assert by is not None
            read = _of_expert(e, f"{by.chosen}[n]")
        leaves.setdefault(e, read)
        return f"given.v[{list(leaves).index(e)}]"

    text = Text(leaf)
    stores = []
    for into, e in phase.writes:
        made, place = f"{TYPES[into.dtype]}({text.write(e)})", f"n * {into.columns} + j"
        if isinstance(into, Summed):
            stores.append(f"peers.put({into.at * ranks}, {into.nbytes}, {place}, {made});")
        else:
            stores.append(f"{into.name}[{place}] = {made};")
    fetched = ", ".join(leaves.values()) or "0.0f"
    count = max(1, len(leaves))
    yield f"p{i}.run({x}, sums, ring, {fetch},"
    yield f"  [&](int n, int j) {{ return Few<{count}>{{{{{fetched}}}}}; }},"
    yield f"  [&](int n, int j, const float (&y)[{phase.parts}], const Few<{count}>& given) {{"
    yield from ("    " + line for line in (*text.lines, *stores))
    yield "  });"


def _of_expert(e: Gathered, expert: str) -> str:
    return f"float(load_shared({e.name} + size_t({expert}) * {e.columns} + {e.offset} + j))"


def _added(e: Added, by: ByExpert, name: str) -> Iterator[str]:
    """What a row's experts give, added up."""

    def leaf(e: Leaf | Routed | Part) -> str:
        if isinstance(e, Gathered):
            return _of_expert(e, f"{by.chosen}[pair]")
        if isinstance(e, Routed):
            return f"{e.name}[pair]"
        assert isinstance(e, Part)
        return f"rounded<{TYPES[e.dtype]}>(y[expert])"

    text = Text(leaf)
    number = text.write(e.of)
    yield f"float {name} = 0;"
    yield "#pragma unroll"
    yield f"for (int expert = 0; expert < {by.experts}; expert++) {{"
    yield f"  const int pair = n * {by.experts} + expert;"
    yield from ("  " + line for line in text.lines)
    yield f"  {name} += {number};"
    yield "}"
    yield f"{name} = rounded<{TYPES[e.dtype]}>({name});"


def declared(name: str, source: Source, dtypes: Callable[[str], mx.Dtype]) -> str:
    """A declaration of MLX's kernel, which says how many threads a block has: without it a thread
    might be given too many registers."""
    inputs = [f"const {TYPES[dtypes(n)]}*" for n in source.inputs]
    outputs = [f"{TYPES[dtypes(n)]}*" for n in source.outputs]
    arguments = ", ".join([*inputs, *outputs])
    return (
        f"namespace mlx::core::cu {{ __global__ void __launch_bounds__({THREADS}, 1) "
        f"custom_kernel_{name}({arguments}); }}\n"
    )
