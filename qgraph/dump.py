"""Writing a plan to a folder, every step of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .serialize import to_json

if TYPE_CHECKING:
    from .ir import Graph
    from .plan import Plan


def dump_plan(plan: Plan, folder: Path) -> Path:
    """The graph as written and after each pass that changed it, with its diff.

    Each is written as text, JSON and DOT.  The JSON names the arrays of constants and does not
    hold them.  `plan.html` shows all of it in a browser.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(plan.source, folder / "00-as-written")
    for number, step in enumerate(plan.steps, 1):
        if step.changed:
            place = folder / f"{number:02}-{step.name}"
            _write(step.after, place)
            place.with_name(f"{place.name}.diff.txt").write_text(f"{plan.diff(number - 1)}\n")
    _write(plan.graph, folder / "plan")
    plan.save(folder / "plan.html")
    (folder / "report.txt").write_text(f"{plan.report()}\n")
    (folder / "ledger.txt").write_text("".join(f"{entry}\n" for entry in plan.ledger()))
    return folder


def _write(graph: Graph, place: Path) -> None:
    place.with_name(f"{place.name}.txt").write_text(f"{graph}\n")
    place.with_name(f"{place.name}.dot").write_text(f"{graph.to_dot()}\n")
    place.with_name(f"{place.name}.json").write_text(f"{to_json(graph, arrays={})}\n")
