"""Write docs/ops.md from the table of ops: `python docs/make_ops.py`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from qgraph.ir.left_out import LEFT_OUT
from qgraph.ir.ops import ALIASES, OPS

PAGE = Path(__file__).parent / "ops.md"


def page() -> str:
    """The list of ops by kind, the aliases, and what is left out and why."""
    lines = ["# Ops", "", f"Every op of the table, {len(OPS)} in all, as `qg.<name>` with the name"]
    lines += ["and signature of `mlx.core`. Each also takes `stream=`. Made by"]
    lines += ["`python docs/make_ops.py`; do not edit.", ""]
    for kind, ops in groupby(OPS.values(), key=lambda op: op.kind):
        title = "indexing and methods of arrays" if kind == "local" else kind
        lines += [f"## {title.capitalize()}", "", *(f"- `{op}`" for op in ops), ""]
    lines += ["## Other names", ""]
    lines += [f"- `{alias}` is `{name}`" for alias, name in sorted(ALIASES.items())]
    lines += ["", "## Left out", ""]
    lines += [f"- `mx.{name}`: {reason}" for name, reason in sorted(LEFT_OUT.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
