"""Pages that are made from code are as the code is; doctests run."""

from __future__ import annotations

import doctest
import importlib
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for folder in ("qgraph", "passes", "docs")
    for p in (ROOT / folder).glob("*.py")
    if p.stem != "__init__"
)


def test_list_of_ops_is_current() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_ops.py"))
    assert made["page"]() == (ROOT / "docs" / "ops.md").read_text()


@pytest.mark.parametrize("name", [m for m in MODULES if not m.startswith("docs")])
def test_doctests(name: str) -> None:
    module = importlib.import_module(name.replace("passes.", "qgraph.passes."))
    assert doctest.testmod(module).failed == 0
