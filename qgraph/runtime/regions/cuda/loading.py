"""Rows that a region computes, eight columns of a thread at a time, as its source has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .attention import THREADS
from .expressions import (
    TYPES,
    Expression,
    Leaf,
    Normed,
    Part,
    Routed,
    Summed,
    Text,
    in_order,
    literal,
)
from .stages import Row, Stages

EARLY = 2
"""Up to how many times eight columns of a thread are fetched before the barrier."""


@dataclass
class Loader:
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
            f"const Eight {name} = {read(x, 'k', self.ranks, eight=True)};"
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


def rows_written(stages: Stages, rows: Sequence[Row], ranks: int) -> Iterator[str]:
    """Written by the last block, which has the least to do."""
    for row in rows:
        loader = Loader(row.expression, row.columns, stages.rows, f"_{row.into}", ranks)
        yield "if (blockIdx.x == gridDim.x - 1) {"
        yield from loader.early()
        yield from loader.rows(f"store_8({row.into} + n * {row.columns} + k, made);")
        yield "}"


def read(x: Leaf, column: str, ranks: int, *, eight: bool = False) -> str:
    """Reads a number of row n, or eight from there on, that another block may have written."""
    place = f"n * {x.columns} + {x.offset} + {column}"
    if isinstance(x, Summed):
        name = "sum_8" if eight else "sum"
        return f"peers.{name}<{TYPES[x.dtype]}>({x.at * ranks}, {x.nbytes}, {place})"
    return f"load_8({x.name} + {place})" if eight else f"float(load_shared({x.name} + {place}))"
