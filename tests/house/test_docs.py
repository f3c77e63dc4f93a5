"""Pages that are made from code are as the code is; doctests run."""

from __future__ import annotations

import doctest
import importlib
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for folder in ("qgraph", "passes")
    for p in (ROOT / folder).rglob("*.py")
    if not (ROOT / "qgraph" / p.relative_to(ROOT).parts[1]).is_symlink()
)


def test_list_of_ops_is_current() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_ops.py"))
    assert made["page"]() == (ROOT / "docs" / "ops.md").read_text()


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    """Of every module, in sub-packages too; a package by its `__init__`."""
    name = name.removesuffix(".__init__")
    module = importlib.import_module(f"qgraph.{name}" if name.startswith("passes") else name)
    assert doctest.testmod(module).failed == 0
