"""What becomes of a product's sums, as a region's source has it."""

from __future__ import annotations

from collections.abc import Iterator

from .experts import ByExpert
from .expressions import TYPES, Added, Gathered, Leaf, Part, Routed, Summed, Text
from .loading import read
from .stages import Phase


def finished(phase: Phase, i: int, x: str, fetch: str, ranks: int) -> Iterator[str]:
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
        fetched = read(e, "j", ranks)
        if isinstance(e, Gathered):
            assert by is not None
            fetched = _of_expert(e, f"{by.chosen}[n]")
        leaves.setdefault(e, fetched)
        return f"given.v[{list(leaves).index(e)}]"

    text = Text(leaf)
    stores = []
    for into, e in phase.writes:
        made, place = f"{TYPES[into.dtype]}({text.write(e)})", f"n * {into.columns} + j"
        if isinstance(into, Summed):
            stores.append(f"peers.put({into.at * ranks}, {into.nbytes}, {place}, {made});")
        else:
            stores.append(f"{into.name}[{place}] = {made};")
    early = ", ".join(leaves.values()) or "0.0f"
    count = max(1, len(leaves))
    yield f"p{i}.run({x}, sums, ring, {fetch},"
    yield f"  [&](int n, int j) {{ return Few<{count}>{{{{{early}}}}}; }},"
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
