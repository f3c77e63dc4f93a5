"""What the page shows, as plain data: each graph once, its nodes with a track.

A track is one number for a node through all the passes: what `matching.match` finds to be the same
node keeps it.  Keys are short because large graphs repeat them ten thousand times;
`web/src/data.ts` names them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..diff import Diff
from ..estimate import estimate
from ..interpret import turns
from ..ir import Graph, Node, Value
from ..names import Names, body_entries, body_inputs
from ..origin import Origin
from ..plan import Plan, PlanStep
from ..profile import Profile
from ..text import call_text, static
from .groups import Group, Groups
from .timeline import Durations, schedule

Record = dict[str, Any]
Tracks = dict[Node, int]


def plan_record(plan: Plan, profile: Profile | None = None) -> Record:
    """A plan: its passes, and the graph after each that changed it."""
    book = _Book()
    graph, tracks = plan.source, book.first(plan.source)
    steps: list[Record] = [{"name": "as written", "graph": book.graph(graph, tracks)}]
    for step in plan.steps:
        record: Record = {
            "name": step.name,
            "contract": step.contract,
        }
        if step.changed:
            diff = Diff(step.before, step.after, step.entries, title=step.name)
            tracks = book.follow(tracks, diff)
            record["summary"] = _summary(step, diff)
            record |= book.changes(step, diff)
            graph = step.after
            record["graph"] = book.graph(graph, tracks)
        steps.append(record)
    if graph is not plan.graph:  # a pass that is no step, or a plan put together by hand
        diff = Diff(graph, plan.graph)
        tracks = book.follow(tracks, diff)
        steps.append({"name": "plan", "graph": book.graph(plan.graph, tracks)})
    return book.page(plan.graph, steps, tracks, Durations(plan.target), profile)


def graph_record(graph: Graph, profile: Profile | None = None) -> Record:
    """One graph alone."""
    from ..target import as_target

    book = _Book()
    tracks = book.first(graph)
    steps = [{"name": graph.name, "graph": book.graph(graph, tracks)}]
    return book.page(graph, steps, tracks, Durations(as_target()), profile)


@dataclass
class _Book:
    """Numbers tracks and lines while the graphs of a plan are written."""

    lines: dict[tuple[str, str], int] = field(default_factory=dict)
    _seen: Tracks = field(default_factory=dict)
    _count: Iterator[int] = field(default_factory=itertools.count)

    def first(self, graph: Graph) -> Tracks:
        return {node: self.track(node) for node in _all(graph)}

    def track(self, node: Node) -> int:
        """The track of a node met before, or a new one."""
        if node not in self._seen:
            self._seen[node] = next(self._count)
        return self._seen[node]

    def follow(self, tracks: Tracks, diff: Diff) -> Tracks:
        """The tracks of the graph after a pass."""
        for old, new in diff.same.items():
            self._seen.setdefault(new, tracks[old])
            for was, now in zip(old.bodies, new.bodies, strict=False):
                self._inputs(was, now, tracks)
        self._inputs(diff.before, diff.after, tracks)
        return self.first(diff.after)

    def _inputs(self, was: Graph, now: Graph, tracks: Tracks) -> None:
        named = {v.node.args["name"]: v.node for v in was.inputs}
        for value in now.inputs:
            old = named.get(value.node.args["name"])
            if old is not None and value.node not in tracks:
                self._seen.setdefault(value.node, tracks[old])

    def changes(self, step: PlanStep, diff: Diff) -> Record:
        """What a pass did, by tracks."""
        replaced = {
            (self.track(old.node), self.track(new.node))
            for old, new in {**step.replaced, **diff.replaced}.items()
            if old.node in self._seen and new.node in self._seen
        }
        return {
            "changes": [
                {
                    "out": [self.track(n) for n in change.removed],
                    "in": [self.track(n) for n in change.added],
                    "moved": [self.track(n) for _, n in change.moved],
                    "altered": [self.track(n) for _, n in change.altered],
                    "why": [_reason(e.decision, e.case, e.reason) for e in change.reasons],
                }
                for change in diff.changes
            ],
            "replaced": sorted(pair for pair in replaced if pair[0] != pair[1]),
            "refused": sorted(
                {(self.line(e.origin), e.what.split(" ", 1)[0], e.reason) for e in diff.refused}
            ),
        }

    def line(self, origin: Origin) -> int:
        if not str(origin):
            return -1
        return self.lines.setdefault((str(origin), origin.source()), len(self.lines))

    def graph(self, graph: Graph, tracks: Tracks) -> Record:
        return _GraphWriter(self, graph, tracks).record()

    def page(
        self,
        graph: Graph,
        steps: list[Record],
        tracks: Tracks,
        durations: Durations,
        profile: Profile | None,
    ) -> Record:
        record: Record = {
            "name": graph.name,
            "target": str(durations.target),
            "steps": steps,
        }
        if profile is not None:
            measured = {r.node: (r.seconds, r.times) for r in profile.rows}
            durations = Durations(profile.target, measured, profile.copy_bandwidth)
            record["target"] = str(profile.target)
            record["profile"] = {
                "seconds": profile.seconds,
                "total": profile.total,
                "bandwidth": profile.copy_bandwidth,
                "rows": [
                    [tracks[r.node], r.seconds, r.times, r.cost.nbytes, r.estimate]
                    for r in profile.rows
                    if r.node in tracks
                ],
            }
        record["timelines"] = list(_timelines(graph, tracks, durations))
        record["bandwidth"] = durations.bandwidth
        record["lines"] = list(self.lines)
        return record


class _GraphWriter:
    def __init__(self, book: _Book, graph: Graph, tracks: Tracks) -> None:
        self.book, self.graph, self.tracks = book, graph, tracks
        self.names = Names(graph)
        self.groups = Groups(graph, self.names)
        self.nodes = list(_all(graph))
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.group_place: dict[Group | None, int] = {g: i for i, g in enumerate(self.groups.all)}
        self.group_place[None] = -1
        self.entries: dict[Node, Value] = {}
        self.invariants: set[Node] = set()
        for node in self.nodes:
            for i, entries in enumerate(body_entries(node)):
                self.entries |= {v.node: source for v, source in entries if source is not None}
                self.invariants |= {v.node for v, _ in body_inputs(node)[i][1]}

    def record(self) -> Record:
        return {
            "groups": [self.group(group) for group in self.groups.all],
            "nodes": [self.node(node) for node in self.nodes],
            "outputs": [self.value(v) for v in self.graph.outputs],
        }

    def group(self, group: Group) -> Record:
        record: Record = {
            "kind": group.kind,
            "label": group.label,
            "parent": self.group_place[group.parent],
        }
        if group.kind == "loop" and group.node is not None:
            record["node"] = self.place[group.node]
        if group.body is not None:
            record["yields"] = [self.value(v) for v in group.body.outputs]
        return record

    def value(self, value: Value) -> list[int]:
        return [self.place[value.node], value.index]

    def node(self, node: Node) -> Record:
        source = self.entries.get(node)
        inputs = [source] if source is not None else list(dict.fromkeys(node.inputs))
        record: Record = {
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
        return record | {name: entry for name, entry in optional.items() if entry}


def _all(graph: Graph) -> Iterator[Node]:
    """Inputs and nodes, a loop's bodies right after it."""
    for value in graph.inputs:
        yield value.node
    for node in graph.nodes:
        yield node
        for body in node.bodies:
            yield from _all(body)


def _timelines(graph: Graph, tracks: Tracks, durations: Durations) -> Iterator[Record]:
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
