"""What the page shows, as plain data: each graph once, its nodes with its track.

Keys are short because large graphs repeat them ten thousand times;
`web/src/data.ts` names them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ...analysis.estimate import estimate
from ...analysis.schedule import Durations, schedule
from ...ir.graph import Graph, Node, Value
from ...ir.loops import body_entries, body_inputs, turns
from ...origin import Origin
from ...rewrite.history import History, PlanStep
from ...target import as_target
from ..diff import Diff
from ..names import Names
from ..profile import Profile
from ..text import call_text, static
from .groups import Group, Groups
from .tracks import Tracks, changes, nodes_of

Json = dict[str, Any]
Numbers = dict[Node, int]


def plan_page(plan: History, profile: Profile | None = None) -> Json:
    """A plan: its passes, and the graph after each that changed it."""
    book = _Book()
    tracks = book.tracks.first(plan.source)
    steps: list[Json] = [{"name": "as written", "graph": book.graph(plan.source, tracks)}]
    for step, diff in changes(plan):
        page: Json = {"name": step.name, "contract": step.contract}
        if diff is not None:
            tracks = book.tracks.follow(diff)
            page["summary"] = _summary(step, diff)
            page |= book.changes(step, diff)
            page["graph"] = book.graph(step.after, tracks)
        steps.append(page)
    return book.page(plan.graph, steps, tracks, Durations(plan.target), profile)


def graph_page(graph: Graph, profile: Profile | None = None) -> Json:
    """One graph alone."""
    book = _Book()
    tracks = book.tracks.first(graph)
    steps = [{"name": graph.name, "graph": book.graph(graph, tracks)}]
    return book.page(graph, steps, tracks, Durations(as_target()), profile)


@dataclass
class _Book:
    """Numbers tracks and lines while the graphs of a plan are written."""

    lines: dict[tuple[str, str], int] = field(default_factory=dict)
    tracks: Tracks = field(default_factory=Tracks)

    def changes(self, step: PlanStep, diff: Diff) -> Json:
        """What a pass did, by tracks."""
        track = self.tracks.of
        replaced = {
            (track(old.node), track(new.node))
            for old, new in {**step.replaced, **diff.replaced}.items()
            if old.node in self.tracks and new.node in self.tracks
        }
        return {
            "changes": [
                {
                    "out": [track(n) for n in change.removed],
                    "in": [track(n) for n in change.added],
                    "moved": [track(n) for _, n in change.moved],
                    "altered": [track(n) for _, n in change.altered],
                    "why": [_reason(e.decision, e.case, e.reason) for e in change.reasons],
                }
                for change in diff.changes
            ],
            "replaced": sorted(pair for pair in replaced if pair[0] != pair[1]),
            "refused": sorted({(self.line(e.origin), e.op, e.reason) for e in diff.refused}),
        }

    def line(self, origin: Origin) -> int:
        if not str(origin):
            return -1
        return self.lines.setdefault((str(origin), origin.source()), len(self.lines))

    def graph(self, graph: Graph, tracks: Numbers) -> Json:
        return _GraphWriter(self, graph, tracks).written()

    def page(
        self,
        graph: Graph,
        steps: list[Json],
        tracks: Numbers,
        durations: Durations,
        profile: Profile | None,
    ) -> Json:
        page: Json = {
            "name": graph.name,
            "target": str(durations.target),
            "steps": steps,
        }
        if profile is not None:
            measured = {r.node: (r.seconds, r.times) for r in profile.rows}
            durations = Durations(profile.target, measured, profile.copy_bandwidth)
            page["target"] = str(profile.target)
            page["profile"] = {
                "seconds": profile.seconds,
                "total": profile.total,
                "bandwidth": profile.copy_bandwidth,
                "rows": [
                    [tracks[r.node], r.seconds, r.times, r.cost.nbytes, r.estimate]
                    for r in profile.rows
                ],
            }
        page["timelines"] = list(_timelines(graph, tracks, durations))
        page["bandwidth"] = durations.bandwidth
        page["lines"] = list(self.lines)
        return page


class _GraphWriter:
    def __init__(self, book: _Book, graph: Graph, tracks: Numbers) -> None:
        self.book, self.graph, self.tracks = book, graph, tracks
        self.names = Names(graph)
        self.groups = Groups(graph, self.names)
        self.nodes = list(nodes_of(graph))
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.group_place: dict[Group | None, int] = {g: i for i, g in enumerate(self.groups.all)}
        self.group_place[None] = -1
        self.entries: dict[Node, Value] = {}
        self.invariants: set[Node] = set()
        for node in self.nodes:
            for i, entries in enumerate(body_entries(node)):
                self.entries |= {v.node: source for v, source in entries if source is not None}
                self.invariants |= {v.node for v, _ in body_inputs(node)[i][1]}

    def written(self) -> Json:
        return {
            "groups": [self.group(group) for group in self.groups.all],
            "nodes": [self.node(node) for node in self.nodes],
            "outputs": [self.value(v) for v in self.graph.outputs],
        }

    def group(self, group: Group) -> Json:
        page: Json = {
            "kind": group.kind,
            "label": group.label,
            "parent": self.group_place[group.parent],
        }
        if group.kind == "loop" and group.node is not None:
            page["node"] = self.place[group.node]
        if group.body is not None:
            page["yields"] = [self.value(v) for v in group.body.outputs]
        return page

    def value(self, value: Value) -> list[int]:
        return [self.place[value.node], value.index]

    def node(self, node: Node) -> Json:
        source = self.entries.get(node)
        inputs = [source] if source is not None else list(dict.fromkeys(node.inputs))
        page: Json = {
            "t": self.tracks[node],
            "op": node.op,
            "o": [[self.names[v], str(v.type), v.type.nbytes] for v in node.outputs],
            "i": [self.value(v) for v in inputs],
            "p": self.group_place[self.groups.of.get(node)],
        }
        optional = {
            "l": self.book.line(node.origin) + 1,
            "m": node.origin.made_by,
            "k": node.kernel,
            "s": "" if node.stream is None else str(node.stream),
            "g": "" if node.stage == "run" else node.stage,
            "v": int(node in self.invariants),
        }
        if node.op not in ("input", "constant"):
            cost = estimate(node)
            optional["b"], optional["f"] = int(cost.nbytes), int(cost.flops)
            optional["c"] = call_text(node, self.names, limit=12)
            optional["a"] = {
                name: static(arg)
                for name, arg in node.attrs.items()
                if name != "problem" and not node.bodies
            }
        return page | {name: entry for name, entry in optional.items() if entry}


def _timelines(graph: Graph, tracks: Numbers, durations: Durations) -> Iterator[Json]:
    """One for the graph, and one for a turn of each loop or a branch."""
    names = Names(graph)
    pending = [("one call", graph, 1)]
    while pending:
        title, each, times = pending.pop(0)
        bars = schedule(each, durations)
        if bars:
            yield {
                "title": title,
                "times": times,
                "bars": [
                    [tracks[b.node], b.stream, round(b.start * 1e6, 2), round(b.seconds * 1e6, 2)]
                    for b in bars
                ],
            }
        for node in each.nodes:
            for body in node.bodies:
                what = f"{body.name} of {node.op} {names[node.outputs[0]] if node.outputs else ''}"
                count = 1 if node.op == "cond" else (turns(node) or 1)
                pending.append((f"one turn: {what}".rstrip(), body, times * count))


def _summary(step: PlanStep, diff: Diff) -> str:
    decided = Counter(entry.decision for entry in step.entries)
    return ", ".join([*(f"{count} {what}" for what, count in decided.items()), diff.summary()])


def _reason(decision: str, case: int, reason: str) -> str:
    number = f", case {case}" if case else ""
    return f"{decision}{number}: {reason}" if reason else f"{decision}{number}"
