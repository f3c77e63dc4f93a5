"""What passes decided, and why: entries that a plan collects while passes run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from ..ir.graph import Node, Value
from ..ir.kinds import SAME_ELEMENTS
from ..origin import NOWHERE, Origin
from ..types import TensorType

Decision = Literal[
    "fused",
    "hoisted",
    "packed",
    "prepared",
    "kept",
    "refused",
    "chosen",
    "merged",
    "rewritten",
    "split",
    "replicated",
    "inserted",
]


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision about one node.

    Attributes:
        made_by: the pass.
        decision: what it did.
        op: of the node; empty for an entry about a weight or a setting.
        origin: the user's line.
        reason: for a refusal, why and what would make it possible; else the case that applied.
        case: the number of the case in the pass's docstring; 0 where it has none.
        name: of the weight, where there is one.
        types: of the operands that tell this node from others, or of the weight.
        about: what to print in place of the types.
    """

    made_by: str
    decision: Decision
    op: str = ""
    origin: Origin = NOWHERE
    reason: str = ""
    case: int = 0
    name: str = ""
    types: tuple[TensorType, ...] = ()
    about: str = ""

    @staticmethod
    def of(
        node: Node,
        made_by: str,
        decision: Decision,
        reason: str = "",
        case: int = 0,
        name: str = "",
        *,
        types: tuple[TensorType, ...] | None = None,
        about: str = "",
    ) -> Entry:
        """An entry about a node; its types are by default the first operand's."""
        if types is None:
            types = tuple(v.type for v in node.inputs[:1])
        return Entry(made_by, decision, node.op, node.origin, reason, case, name, types, about)

    @property
    def what(self) -> str:
        """What it is about, to read: "matmul of f32[2,64]", or a weight and its type."""
        types = " with ".join(map(str, self.types))
        if self.op:
            return " ".join(filter(None, [self.op, self.about or (types and f"of {types}")]))
        return self.about or f"{self.name} {types}"

    def __str__(self) -> str:
        case = f"(case {self.case})" if self.case else ""
        name = f"({self.name})" if self.name and self.name not in self.what else ""
        where = str(self.origin) if str(self.origin) not in self.what else ""
        said = " ".join(filter(None, [self.decision, case, self.what, name, where]))
        return f"{said}: {self.reason}" if self.reason else said


LOWERING = "lowering"
"""Who makes entries after all passes: the runtime, as it makes a program ready."""

_active: ContextVar[list[Entry] | None] = ContextVar("ledger", default=None)


@contextmanager
def collecting() -> Iterator[list[Entry]]:
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


def weight_name(value: Value) -> str:
    """What the user calls the weight behind a value: through views, quantization and indexing."""
    while value.node.op in SAME_ELEMENTS | {
        "quantize",
        "dequantize",
        "getitem",
        "take",
        "distributed.part",
    }:
        value = value.node.inputs[0]
    return str(value.node.args.get("name", "") or "")
