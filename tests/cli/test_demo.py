"""`qgraph demo` on the model that needs no download."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qgraph.cli import demo
from tests.support.compiler import needs_compiler


@needs_compiler
def test_its_table_tells_the_phases_of_a_token(tmp_path: Path) -> None:
    console = Console(width=80, record=True)
    assert demo.main("toy", "Hello", tmp_path, 3, console) == 0
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1]
            for line in console.export_text().splitlines() if line.startswith("│")}  # fmt: skip
    before, after = rows["+ stored-scales"], rows["+ form-regions"]
    assert before[3].strip() == ""
    assert int(after[3]) > 10
    assert all(cells[-1].strip() == "yes" for cells in rows.values())
