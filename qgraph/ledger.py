"""What passes decided, and why: entries that a plan collects while passes run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from .origin import NOWHERE, Origin

Decision = Literal["fused", "hoisted", "packed", "prepared", "kept", "refused", "chosen", "merged"]


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
    nodes: tuple[int, ...] = field(default=())
    """Serials of the nodes it is about, before and after."""

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
