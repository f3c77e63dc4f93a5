"""Lines of a graph on the page: columns, gaps, colours."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.text import Text

from ..ir.graph import Node

_MARGIN = 88
"""Origins stand in one column, no further right than this unless a line is longer."""


@dataclass(slots=True)
class Line:
    indent: int
    text: str
    origin: str = ""
    choices: str = ""
    node: Node | None = None
    cost: str = ""


class Shown(Protocol):
    """What to write beside the nodes."""

    @property
    def origins(self) -> bool: ...

    @property
    def choices(self) -> bool: ...

    @property
    def notes(self) -> Mapping[Node, str]: ...


def in_columns(lines: Sequence[Line], options: Shown) -> Iterator[str]:
    """Origins in one column, choices and costs after them."""
    notes = [
        [
            line.origin if options.origins else "",
            line.choices if options.choices else "",
            line.cost,
            options.notes.get(line.node, "") if line.node is not None else "",
        ]
        for line in lines
    ]
    lengths = [len(x.text) + x.indent for x, n in zip(lines, notes, strict=True) if any(n)]
    column = max((n for n in lengths if n <= _MARGIN), default=0) + 2
    width = max((len(n[0]) for n in notes if any(n[1:])), default=0)
    for line, (origin, *rest) in zip(lines, notes, strict=True):
        text = " " * line.indent + line.text
        right = "  ".join(filter(None, rest))
        if right:
            origin = f"{origin.ljust(width)}  {right}" if width else right
        yield f"{text.ljust(column - 2)}  {origin}" if origin else text


def only(lines: Sequence[Line], chosen: set[Node]) -> list[Line]:
    """The lines of chosen nodes, with the heads of what they stand in; gaps are counted."""
    kept: set[int] = set()
    heads: list[int] = []
    for i, line in enumerate(lines):
        while heads and lines[heads[-1]].indent >= line.indent:
            heads.pop()
        if line.node in chosen and line.node is not None:
            kept |= {i, *heads}
        heads.append(i)
    result: list[Line] = []
    skipped = 0
    for i, line in enumerate(lines):
        if i in kept or line.indent == 0:
            if skipped:
                result.append(Line(line.indent or 2, f"... {skipped} not shown"))
            result.append(line)
            skipped = 0
        elif line.node is not None:
            skipped += 1
    if skipped:
        result.append(Line(2, f"... {skipped} not shown"))
    return result


def coloured(text: str) -> str:
    """The text of a graph with ANSI colours."""
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", width=10**6,
        highlight=False, no_color=False,
    )  # fmt: skip
    result = Text(text)
    for pattern, style in _COLOURS:
        result.highlight_regex(pattern, style)
    console.print(result, soft_wrap=True, end="")
    shown = console.file
    assert isinstance(shown, io.StringIO)
    return shown.getvalue()


_COLOURS = [
    (r"(?m)^ *(graph|body|pack|prepare|yield|return)\b", "bold magenta"),
    (r"\b(?:bool|u8|u16|u32|u64|i8|i16|i32|i64|f16|bf16|f32|f64|c64)\[[\d,]*\]", "cyan"),
    (r"%[\w.]+", "yellow"),
    (r"@[\w.]+", "green"),
    (r"(?<== )[a-z_][\w.]*", "bold"),
    (r"(?m) {2}\S+\.py:\d+", "dim"),
    (r"kernel=\S+|stream=\S+", "blue"),
]
