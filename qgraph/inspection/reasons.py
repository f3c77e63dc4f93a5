"""What no pass spoke of, in words: why a quantize, dequantize or product is there or gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from ..analysis.changes import CALLS, PARAMETERS, behind_views, changes, readers
from ..ir.graph import Graph, Node, Value
from ..ir.kinds import PRODUCTS
from ..ir.loops import outermost
from ..origin import Origin
from ..rewrite.ledger import Decision, Entry, weight_name
from ..types import TensorType

_WATCHED = PRODUCTS | {"quantize", "dequantize"}


def unmentioned(source: Graph, final: Graph, entries: Sequence[Entry]) -> list[Entry]:
    """Entries for the quantizes, dequantizes and products of `source` that no pass spoke of."""
    exactly = {(*_line(e.origin), e.op, e.types[:1]) for e in entries}
    roughly = {key[:3] for key in exactly}
    left = {_key(node) for _, node in final.walk() if node.op in _WATCHED}
    raised = {_line(e.origin): e.op for e in entries if e.made_by.startswith("raise-")}
    why = _Reasons(source, raised)
    found: dict[Entry, None] = {}
    for graph, node in source.walk():
        if node.op not in _WATCHED or (key := _key(node)) in exactly:
            continue
        if key in left:
            found[_entry(node, "kept", why.kept(graph, node))] = None
        elif key[:3] not in roughly:
            found[_entry(node, *why.gone(graph, node))] = None
    return list(found)


def _line(origin: Origin) -> tuple[str, int]:
    return origin.file, origin.line


def _key(node: Node) -> tuple[str, int, str, tuple[TensorType, ...]]:
    """What an entry about `node` has of it: its line, its op and the type of its first operand."""
    return (*_line(node.origin), node.op, tuple(v.type for v in node.inputs[:1]))


def _entry(node: Node, decision: Decision, reason: str) -> Entry:
    name = weight_name(node.inputs[0]) if node.op in ("quantize", "dequantize") else ""
    return Entry.of(node, "", decision, reason, name=name)


class _Reasons:
    """Why nodes of the graph as written are still there, or no longer."""

    def __init__(self, graph: Graph, raised: Mapping[tuple[str, int], str]) -> None:
        self._raised = raised
        self._changes = changes(graph)
        self._outermost = outermost(graph)

    def kept(self, graph: Graph, node: Node) -> str:
        if node.op in ("quantized_matmul", "gather_qmm"):
            return "a quantized product as it was written"
        if node.op == "quantize":
            return f"it quantizes what depends on {self._changes[node.operand('w')].by}"
        if node.op == "dequantize":
            return self._read_dense(graph, node)
        weights = [name for v in node.inputs if (name := self._float_weight(v)) is not None]
        if weights:
            return f"its weight{weights[0]} is float; optimize(..., quantize=) packs such weights"
        return "neither operand is a weight"

    def gone(self, graph: Graph, node: Node) -> tuple[Decision, str]:
        """The decision and the reason."""
        by = list(dict.fromkeys(reader.op for reader in readers(graph, node.output)))
        if node.op == "dequantize" and by:
            return "fused", f"into the {' and the '.join(by)} that {_reads(by)} it"
        if not by and node.output not in graph.outputs:
            return "merged", "nothing reads its result"
        larger = self._raised.get(_line(node.origin), node.op)
        if larger != node.op:
            return "merged", f"it is part of {larger} now"
        return "merged", "an equal one is computed for all that read it"

    def _read_dense(self, graph: Graph, node: Node) -> str:
        by = list(dict.fromkeys(reader.op for reader in readers(graph, node.output)))
        if node.output in graph.outputs:
            by.append("result")
        made = node.operand("w").node
        if made.op == "quantize" and self._changes[made.operand("w")].level >= CALLS:
            return "it rounds an activation, which no packed form stands for"
        products = [op for op in by if op in PRODUCTS]
        if products:
            return f"the {products[0]} that reads it did not fuse"
        return f"the {' and the '.join(by)} that {_reads(by)} it {_needs(by)} it dense"

    def _float_weight(self, value: Value) -> str | None:
        """The name of a float constant or parameter behind an operand, after a space."""
        source = behind_views(value)
        source = behind_views(self._outermost.get(source, source))
        fixed = source.node.op == "constant" or self._changes[source].level == PARAMETERS
        if not fixed or source.ndim < 2 or not mx.issubdtype(source.dtype, mx.floating):
            return None
        name = str(source.node.args.get("name", ""))
        return f" {name}" if name else ""


def _reads(ops: list[str]) -> str:
    return "reads" if len(ops) == 1 else "read"


def _needs(ops: list[str]) -> str:
    return "needs" if len(ops) == 1 else "need"
