"""Plans: what the optimizer made of a graph, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, writing
from ..inspection.reasons import unmentioned
from ..inspection.report import PackedWeight, packed_weights, report
from ..inspection.serialize import to_json
from ..inspection.timeline import timelines
from ..ir.graph import Graph
from ..origin import NOWHERE
from ..rewrite.history import History
from ..rewrite.ledger import Entry

if TYPE_CHECKING:
    from ..inspection.diff import Diff
    from ..inspection.profile import Profile


class Plan(History):
    """An optimized graph, how it came about, and what it is for; made by `qgraph.optimize`."""

    def ledger(self) -> list[Entry]:
        """Every decision about a quantize, a dequantize or a product, in order."""
        entries = [entry for step in self.steps for entry in step.entries]
        return [*entries, *unmentioned(self.source, self.graph, entries), *self.lowered]

    def lowered_as(self, entries: Sequence[Entry]) -> Plan:
        """The plan of a program that was made ready with these decisions."""
        return replace(self, lowered=tuple(entries)) if entries else self

    def weights(self) -> list[PackedWeight]:
        """The weights that the pack and prepare steps quantize."""
        return packed_weights(self.graph)

    def report(self, width: int = 100) -> str:
        """Tables of the passes, of the weights that are packed and of the schedule.

        The schedule is estimated: what each stream has to do, and the critical path, which no
        number of streams shortens.  Weights that could not be quantized are named.
        """
        return report(self, self.ledger(), width)

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
        from ..inspection.diff import Diff

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
            InputError: there is no such format for plans.
            QGraphError: the file cannot be written.
            InputError: the profile is of another plan.
        """
        from ..inspection.viewer import save_html
        from ..inspection.viewer.model_explorer import to_model_explorer

        place = Path(path)
        if place.name.endswith(".me.json"):
            text = to_model_explorer(self) + "\n"
            with writing(place):
                place.write_text(text, encoding="utf-8")
            return place
        if place.suffix != ".html":
            raise InputError(
                f"no format for a plan: {place.name}",
                hint="a plan is saved as .html or .me.json, its graph by plan.graph.save",
            )
        return save_html(self, place, profile)

    def dump(self, folder: str | Path) -> Path:
        """Write every step as text, JSON and DOT, a page, the report and the ledger to a folder.

        The graph is there as written and after each pass that changed it, with the pass's diff.
        The JSON names the arrays of constants and does not hold them.  Returns the folder.

        Raises:
            QGraphError: the folder cannot be written.
        """
        place = Path(folder)
        with writing(place):
            self._dump(place)
        return place

    def _dump(self, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        _write(self.source, place / "00-as-written")
        for number, step in enumerate(self.steps, 1):
            if step.changed:
                name = f"{number:02}-{step.name}"
                _write(step.after, place / name)
                (place / f"{name}.diff.txt").write_text(f"{self.diff(number - 1)}\n")
        _write(self.graph, place / "plan")
        self.save(place / "plan.html")
        (place / "report.txt").write_text(f"{self.report()}\n")
        (place / "ledger.txt").write_text("".join(f"{entry}\n" for entry in self.ledger()))


def _write(graph: Graph, place: Path) -> None:
    place.with_name(f"{place.name}.txt").write_text(f"{graph}\n")
    place.with_name(f"{place.name}.dot").write_text(f"{graph.to_dot()}\n")
    place.with_name(f"{place.name}.json").write_text(f"{to_json(graph, arrays={})}\n")
