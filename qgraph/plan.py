"""Plans: what the optimizer made of a graph, step by step."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .errors import InputError
from .ir import Graph, Node, Value
from .ledger import Entry, unmentioned
from .origin import NOWHERE
from .target import Target
from .timeline import schedule_table, timelines

if TYPE_CHECKING:
    from .diff import Diff
    from .profile import Profile


@dataclass(frozen=True)
class PlanStep:
    """One pass that ran: the graph before and after, the time it took, what it decided.

    Attributes:
        contract: "exact", or "tolerance" where the pass promises no more.
        replaced: which value took which one's place, where the pass used `rewrite`.
    """

    name: str
    before: Graph
    after: Graph
    milliseconds: float
    entries: tuple[Entry, ...] = ()
    contract: str = "tolerance"
    replaced: Mapping[Value, Value] = field(default_factory=dict, repr=False)

    @property
    def changed(self) -> bool:
        return self.after is not self.before

    def summary(self) -> str:
        """What changed, in a few words."""
        if not self.changed:
            return "nothing"
        decided: dict[str, int] = {}
        for entry in self.entries:
            decided[entry.decision] = decided.get(entry.decision, 0) + 1
        words = [f"{count} {decision}" for decision, count in decided.items()]
        removed, added = node_changes(self.before, self.after)
        words.append(f"{len(removed)} nodes out, {len(added)} in")
        return ", ".join(words)


def node_changes(before: Graph, after: Graph) -> tuple[list[Node], list[Node]]:
    """Nodes that only `before` holds and nodes that only `after` holds, bodies included."""
    old = dict.fromkeys(node for _, node in before.walk())
    new = dict.fromkeys(node for _, node in after.walk())
    return [n for n in old if n not in new], [n for n in new if n not in old]


@dataclass(frozen=True)
class PackedWeight:
    """What packing makes of one weight."""

    name: str
    float_bytes: int
    packed_bytes: int
    bits: int


@dataclass(frozen=True)
class Plan:
    """An optimized graph, how it came about, and what it is for.

    Attributes:
        graph: the optimized graph.
        source: the graph as it was written.
        steps: every pass that ran.
        target: what it was optimized for.
    """

    graph: Graph
    source: Graph
    target: Target
    steps: tuple[PlanStep, ...] = field(default=())

    def ledger(self) -> list[Entry]:
        """Every decision about a quantize, a dequantize or a product, in order."""
        entries = [entry for step in self.steps for entry in step.entries]
        return entries + unmentioned(self.source, self.graph, entries)

    def weights(self) -> list[PackedWeight]:
        """The weights that the pack and prepare steps quantize."""
        found = []
        for node in self.graph.nodes:
            if node.op == "quantize" and node.stage != "run":
                source = node.operand("w")
                packed = sum(v.type.nbytes for v in node.outputs)
                name = str(source.node.args.get("name", "")) or source.node.op
                found.append(PackedWeight(name, source.type.nbytes, packed, node.args["bits"]))
        return found

    def report(self, width: int = 100) -> str:
        """Tables of the passes, of the weights that are packed and of the schedule.

        The schedule is estimated: what each stream has to do, and the critical path, which no
        number of streams shortens.  Weights that could not be quantized are named.
        """
        passes = Table(title=f"passes for {self.target}", title_justify="left")
        for heading, justify in (
            ("pass", "left"),
            ("before", "right"),
            ("after", "right"),
            ("what changed", "left"),
            ("ms", "right"),
        ):
            passes.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for step in self.steps:
            passes.add_row(
                step.name,
                str(step.before.count()),
                str(step.after.count()),
                step.summary(),
                f"{step.milliseconds:.1f}",
            )
        tables = [passes]
        if weights := self.weights():
            tables.append(_weight_table(weights))
        if any(node.stage == "run" and node.op != "constant" for node in self.graph.nodes):
            tables.append(schedule_table(self.graph, self.target))
        left = [e for e in self.ledger() if e.made_by == "quantize-weights"]
        lines = [f"not quantized: {e.what}: {e.reason}" for e in left if e.decision == "refused"]
        return "\n".join([*(_render(table, width) for table in tables), *lines])

    def timeline(self, width: int = 100) -> str:
        """The estimated schedule drawn as text: a line for each stream.

        >>> import qgraph as qg
        >>> plan = qg.optimize(qg.trace(lambda x: qg.exp(x) + 1, qg.spec((4,)), name="f"))
        >>> print(plan.timeline(width=40).splitlines()[0])
        f: one call, estimated 2 µs on cpu
        """
        return timelines(self.graph, self.target, width)

    def check(self, *inputs: Any) -> None:
        """Run the graph after every pass on sample inputs and compare.

        Raises:
            ContractError: names the first pass, and node, that changes the result by more than
                it promised.

        >>> import mlx.core as mx, qgraph as qg
        >>> plan = qg.optimize(qg.trace(lambda x: qg.exp(x) + 1, qg.spec((4,))))
        >>> plan.check(mx.ones(4))
        """
        from .check import check_plan

        check_plan(self, inputs)

    def diff(self, run: str | int | None = None) -> Diff:
        """What a pass did, node by node, with the ledger's reasons; print it.

        Args:
            run: name of a pass (the first time it changed something counts) or its position in
                `steps`; by default what all of them did together.

        Raises:
            InputError: no such pass ran.

        >>> import qgraph as qg
        >>> graph = qg.trace(lambda x: (qg.exp(x), qg.exp(x)), qg.spec((4,)))
        >>> qg.optimize(graph, target="cpu").diff("eliminate-common-subexpressions").summary()
        '1 node out'
        """
        from .diff import Diff

        if run is None:
            return Diff(self.source, self.graph, self.ledger(), title="all passes")
        named = [s for i, s in enumerate(self.steps) if run in (i, s.name)]
        if not named:
            known = ", ".join(dict.fromkeys(s.name for s in self.steps)) or "none"
            raise InputError(f"no pass {run!r} ran", hint=f"these did: {known}", origin=NOWHERE)
        step = next((s for s in named if s.changed), named[0])
        return Diff(step.before, step.after, step.entries, title=step.name)

    def save(self, path: str | Path, profile: Profile | None = None) -> Path:
        """Write the graph before and after every pass: `.html` for browsers, or `.me.json`.

        The latter is for Google's Model Explorer.  Other formats are those of a graph:
        `plan.graph.save(path)`.

        Args:
            profile: what `program.profile` measured of this plan; colours nodes by their time.

        Raises:
            ValueError: there is no such format for plans.
            InputError: the profile is of another plan.
        """
        from .model_explorer import to_model_explorer
        from .viewer import save_html

        place = Path(path)
        if place.name.endswith(".me.json"):
            place.write_text(to_model_explorer(self) + "\n", encoding="utf-8")
            return place
        if place.suffix != ".html":
            raise ValueError(
                f"no format for a plan: {place.name}; a plan is saved as .html or .me.json, its "
                "graph by plan.graph.save"
            )
        return save_html(self, place, profile)

    def dump(self, folder: str | Path) -> Path:
        """Write every step as text, JSON and DOT, a page, the report and the ledger to a folder.

        Returns the folder.
        """
        from .dump import dump_plan

        return dump_plan(self, Path(folder))


def _weight_table(weights: Sequence[PackedWeight]) -> Table:
    table = Table(title="weights packed", title_justify="left")
    for heading in ("weight", "float bytes", "packed bytes", "bits"):
        table.add_column(heading, justify="left" if heading == "weight" else "right")
    for w in weights:
        table.add_row(w.name, f"{w.float_bytes:,}", f"{w.packed_bytes:,}", str(w.bits))
    total = (sum(w.float_bytes for w in weights), sum(w.packed_bytes for w in weights))
    table.add_row(
        "all", f"{total[0]:,}", f"{total[1]:,}", f"{total[0] / total[1]:.1f}x smaller", style="bold"
    )
    return table


def _render(table: Table, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().rstrip()
