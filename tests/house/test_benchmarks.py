"""Every benchmark can be started: its modules are there, and so is what they import of ours."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

import benchmarks

NAMES = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_imported(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("qgraph", "benchmarks", "tests"):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("model", ["smollm2", "minilm"])
def test_the_page_has_the_rows_that_are_kept(model: str) -> None:
    """`python -m benchmarks.quality --page` prints them for it."""
    from benchmarks.quality.__main__ import TASKS
    from benchmarks.quality.tables import kept, markdown

    page = Path(benchmarks.__file__).parents[1] / "docs" / "benchmarks.md"
    assert markdown(TASKS[model].measure, kept(model, 2048)) in page.read_text()
