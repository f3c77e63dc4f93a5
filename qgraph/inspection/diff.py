"""What a pass did to a graph, node by node: a diff by identity, not by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..analysis.matching import in_order, match
from ..ir.graph import Graph, Node, Value, is_scalar
from ..rewrite.ledger import Entry
from .names import Names
from .text import STAGES, call_text


@dataclass(frozen=True, slots=True)
class Change:
    """Nodes that went, came, moved or changed together.

    Attributes:
        removed: nodes that only the graph before holds.
        added: nodes that only the graph after holds.
        moved: pairs of a node before and after that stand elsewhere: hoisted out of a loop, or
            into another stage.
        altered: pairs with another kernel or stream.
        reasons: what the ledger says of them.
    """

    removed: tuple[Node, ...] = ()
    added: tuple[Node, ...] = ()
    moved: tuple[tuple[Node, Node], ...] = ()
    altered: tuple[tuple[Node, Node], ...] = ()
    reasons: tuple[Entry, ...] = ()

    @property
    def nodes(self) -> list[Node]:
        pairs = [node for pair in (*self.moved, *self.altered) for node in pair]
        return [*self.removed, *self.added, *pairs]


class Diff:
    """How two graphs differ; `print` it, or read `changes` and `refused`.

    Attributes:
        same: nodes that live on, with what they are in the graph after.
    """

    def __init__(
        self, before: Graph, after: Graph, entries: Sequence[Entry] = (), title: str = ""
    ) -> None:
        self.before, self.after, self.title = before, after, title
        self._entries = tuple(entries)
        self.same = match(before, after)
        self._back = {new: old for old, new in self.same.items()}
        self._homes = dict(in_order(before)), dict(in_order(after))
        self._names = Names(before), Names(after)

    @cached_property
    def replaced(self) -> dict[Value, Value]:
        """Values that went, with what their readers read instead."""
        found: dict[Value, Value] = {}
        readers: list[tuple[Iterable[Value], Iterable[Value]]] = [
            (old.inputs, new.inputs)
            for old, new in self.same.items()
            if old is not new and len(old.inputs) == len(new.inputs)
        ]
        readers.append((self.before.outputs, self.after.outputs))
        for olds, news in readers:
            for old, new in zip(olds, news, strict=False):
                if old.node not in self.same and old.node.op != "input":
                    found.setdefault(old, new)
        return found

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """What changed, in the order of the graph before; connected nodes together."""
        import networkx as nx

        removed = [n for n, _ in in_order(self.before) if n not in self.same and _is_shown(n)]
        added = [n for n, _ in in_order(self.after) if n not in self._back and _is_shown(n)]
        links = nx.Graph()
        links.add_nodes_from([*removed, *added])
        for node in (*removed, *added):
            links.add_edges_from((node, v.node) for v in node.inputs if v.node in links)
        for old, new in self.replaced.items():
            if old.node in links and new.node in links:
                links.add_edge(old.node, new.node)
        parts = {n: i for i, part in enumerate(nx.connected_components(links)) for n in part}
        together: dict[int, tuple[list[Node], list[Node]]] = {}
        for side, nodes in enumerate((removed, added)):
            for node in nodes:
                together.setdefault(parts[node], ([], []))[side].append(node)
        groups = [Change(tuple(out), tuple(into)) for out, into in together.values()]
        for was, now in self.same.items():
            if self._moved(was, now):
                groups.append(Change(moved=((was, now),)))
            elif (was.kernel, was.stream) != (now.kernel, now.stream):
                groups.append(Change(altered=((was, now),)))
        place = {n: i for i, (n, _) in enumerate([*in_order(self.before), *in_order(self.after)])}
        groups.sort(key=lambda change: min(place[node] for node in change.nodes))
        return tuple(self._with_reasons(change) for change in groups)

    def _moved(self, old: Node, new: Node) -> bool:
        home, now = self._homes[0][old], self._homes[1][new]
        same_home = home is now if home is None or now is None else self.same.get(home) is now
        return old.op != "constant" and (not same_home or old.stage != new.stage)

    def _with_reasons(self, change: Change) -> Change:
        lines = {(n.origin.file, n.origin.line) for n in change.nodes}
        ops = {n.op for n in change.nodes}
        read = {str(v.node.args.get("name", "")) for n in change.nodes for v in n.inputs}
        reasons = [
            e
            for e in self._entries
            if e.decision != "refused"
            and (e.origin.file, e.origin.line) in lines
            and (not e.name or e.name in read)
            and e.op in ops
        ]
        return Change(
            change.removed,
            change.added,
            change.moved,
            change.altered,
            tuple(dict.fromkeys(reasons)),
        )

    @property
    def refused(self) -> list[Entry]:
        """What was left alone, and why."""
        return [e for e in self._entries if e.decision == "refused"]

    @property
    def is_empty(self) -> bool:
        return not self.changes

    def summary(self) -> str:
        """How many nodes went, came, moved and changed."""
        counts = {
            "out": sum(len(c.removed) for c in self.changes),
            "in": sum(len(c.added) for c in self.changes),
            "moved": sum(len(c.moved) for c in self.changes),
            "altered": sum(len(c.altered) for c in self.changes),
        }
        words = [f"{n} {'node ' if n == 1 else 'nodes '}{what}" for what, n in counts.items() if n]
        return ", ".join(words) or "nothing changed"

    def format(self, *, colour: bool = False) -> str:
        """The diff as text; changes that are alike are shown once, with their number."""
        lines = [f"{self.title or 'diff'}: {self.summary()}"]
        alike: dict[tuple[str, ...], list[Change]] = {}
        for change in self.changes:
            alike.setdefault(_form(change), []).append(change)
        for changes in alike.values():
            lines += self._change_lines(changes[0], len(changes) - 1)
        refused = Counter((str(e.origin), e.what, e.reason) for e in self.refused)
        if refused:
            lines.append("left alone:")
        for (origin, what, reason), count in refused.items():
            times = f" ({count} times)" if count > 1 else ""
            lines.append(f"  {origin}  {what}{times}: {reason}")
        return _coloured(lines) if colour else "\n".join(lines)

    __str__ = format

    def _change_lines(self, change: Change, more: int) -> list[str]:
        origin = next((n.origin for n in change.nodes if str(n.origin)), None)
        head = f"{origin}  {origin.source()}".rstrip() if origin else "made by the compiler"
        times = f"  ({more} more like it)" if more else ""
        lines = [f"{head}{times}"]
        before, after = self._names
        for node in change.removed:
            new = self.replaced.get(node.outputs[0])
            now = "" if new is None or new.node in change.added else f"   now {after[new]}"
            lines.append(f"  - {self._text(node, before)}{now}")
        stood_for = {new: old for old, new in self.replaced.items()}
        for node in change.added:
            old = stood_for.get(node.outputs[0])
            note = (
                f"   replaces {before[old]}"
                if old is not None and old.node in change.removed
                else ""
            )
            lines.append(f"  + {self._text(node, after)}{note}")
        for old_node, node in change.moved:
            lines.append(f"  > {self._text(node, after)}")
            lines.append(f"      from {self._place(old_node, 0)} to {self._place(node, 1)}")
        for old_node, node in change.altered:
            was, now = _choice(old_node), _choice(node)
            lines.append(f"  ~ {self._text(node, after)}   {was} -> {now}")
        for entry in change.reasons:
            case = f", case {entry.case}" if entry.case else ""
            reason = f": {entry.reason}" if entry.reason else ""
            lines.append(f"    {entry.decision}{case}{reason}")
        return lines

    def _text(self, node: Node, names: Names) -> str:
        results = ", ".join(f"{names[v]}: {v.type}" for v in node.outputs)
        return f"{results} = {call_text(node, names)}"

    def _place(self, node: Node, side: int) -> str:
        home = self._homes[side][node]
        if home is not None:
            name = self._names[side][home.output] if home.outputs else ""
            return f"the body of {name or home.op}"
        return STAGES.get(node.stage, "the graph")


def _is_shown(node: Node) -> bool:
    return not (node.op == "constant" and is_scalar(node.output))


def _choice(node: Node) -> str:
    stream = f"stream={node.stream}" if node.stream is not None else ""
    return " ".join(filter(None, [f"kernel={node.kernel}" if node.kernel else "", stream])) or "-"


def _form(change: Change) -> tuple[str, ...]:
    """What makes two changes alike: ops, user lines and reasons."""

    def words(node: Node) -> str:
        return f"{node.op} {node.origin} {_choice(node)} {node.stage}"

    return (
        *(f"-{words(n)}" for n in change.removed),
        *(f"+{words(n)}" for n in change.added),
        *(f">{words(a)}{words(b)}" for a, b in (*change.moved, *change.altered)),
        *(f"{e.decision}{e.case}{e.reason}" for e in change.reasons),
    )


_STYLES = {"  -": "31", "  +": "32", "  >": "36", "  ~": "33", "   ": "2"}


def _coloured(lines: Sequence[str]) -> str:
    return "\n".join(
        f"\x1b[{_STYLES[line[:3]]}m{line}\x1b[0m"
        if line[:3] in _STYLES
        else f"\x1b[1m{line}\x1b[0m"
        for line in lines
    )


def diff_graphs(before: Graph, after: Graph) -> Diff:
    """How two graphs differ, whatever made them.

    >>> import qgraph as qg
    >>> before = qg.trace(lambda x: qg.exp(x) + 1, qg.spec((4,)), name="f")
    >>> diff_graphs(before, before).is_empty
    True
    """
    return Diff(before, after, title=f"{before.name} -> {after.name}")
