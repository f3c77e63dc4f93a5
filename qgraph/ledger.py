"""What passes decided, and why: entries that a plan collects while passes run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from .ir import Graph, Node
from .origin import NOWHERE, Origin

Decision = Literal[
    "fused", "hoisted", "packed", "prepared", "kept", "refused", "chosen", "merged", "rewritten"
]


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision about one node.

    Attributes:
        made_by: the pass.
        decision: what it did.
        what: the op it is about, with its types.
        origin: the user's line.
        reason: for a refusal, why and what would make it possible; else the case that applied.
        case: the number of the case in the pass's docstring; 0 where it has none.
        name: of the weight, where there is one.
    """

    made_by: str
    decision: Decision
    what: str
    origin: Origin = NOWHERE
    reason: str = ""
    case: int = 0
    name: str = ""

    def __str__(self) -> str:
        case = f" (case {self.case})" if self.case else ""
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.decision}{case} {self.what} {self.origin}{reason}".strip()


_active: ContextVar[list[Entry] | None] = ContextVar("ledger", default=None)


@contextmanager
def recording() -> Iterator[list[Entry]]:
    """Collect the entries that passes record while this is open."""
    entries: list[Entry] = []
    token = _active.set(entries)
    try:
        yield entries
    finally:
        _active.reset(token)


def record(entry: Entry) -> None:
    """Note a decision; does nothing where nobody collects."""
    entries = _active.get()
    if entries is not None and entry not in entries[-64:]:
        entries.append(entry)


PRODUCTS = frozenset(
    {"matmul", "addmm", "einsum", "tensordot", "inner", "gather_mm", "quantized_matmul",
     "gather_qmm"}
)  # fmt: skip
_WATCHED = PRODUCTS | {"quantize", "dequantize"}


def unmentioned(source: Graph, final: Graph, entries: Sequence[Entry]) -> list[Entry]:
    """Entries for the quantizes, dequantizes and products of `source` that no pass spoke of."""
    spoken = {(e.origin.file, e.origin.line, e.what.split()[0]) for e in entries}
    left = {_place(node) for _, node in final.walk() if node.op in _WATCHED}
    found: dict[tuple[str, int, str], Entry] = {}
    for _, node in source.walk():
        place = _place(node)
        if node.op in _WATCHED and place not in spoken:
            name = str(node.inputs[0].node.args.get("name", "")) if node.inputs else ""
            what = f"{node.op} of {node.inputs[0].type}" if node.inputs else node.op
            reason = _why_kept(node) if place in left else "into the product that reads it"
            decision: Decision = "kept" if place in left else "fused"
            found.setdefault(place, Entry("", decision, what, node.origin, reason, name=name))
    return list(found.values())


def _place(node: Node) -> tuple[str, int, str]:
    return node.origin.file, node.origin.line, node.op


def _why_kept(node: Node) -> str:
    if node.op in ("quantized_matmul", "gather_qmm"):
        return "a quantized product as it was written"
    if node.op == "quantize":
        return "what it quantizes changes from call to call, or from turn to turn"
    if node.op == "dequantize":
        return "its dense result is read by something that is no product"
    return "neither operand is a dequantized weight"
