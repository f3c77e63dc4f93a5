"""Writing a plan to a folder, every step of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan


def dump_plan(plan: Plan, folder: Path) -> Path:
    """Numbered text of the graph as written and after each pass that changed it, and its diff."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "00-as-written.txt").write_text(f"{plan.source}\n")
    for number, step in enumerate(plan.steps, 1):
        if step.changed:
            (folder / f"{number:02}-{step.name}.txt").write_text(f"{step.after}\n")
            diff = plan.diff(number - 1)
            (folder / f"{number:02}-{step.name}.diff.txt").write_text(f"{diff}\n")
    (folder / "plan.txt").write_text(f"{plan.graph}\n")
    (folder / "report.txt").write_text(f"{plan.report()}\n")
    (folder / "ledger.txt").write_text("".join(f"{entry}\n" for entry in plan.ledger()))
    return folder
