"""The site: outputs are current, links lead somewhere, every page is in it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
MAKE: dict[str, Any] = runpy.run_path(str(DOCS / "make_pages.py"))
PAGES = sorted(DOCS.glob("*.md")) + sorted(DOCS.glob("guide/*.md"))


@pytest.mark.parametrize("page", MAKE["pages"](), ids=lambda p: p.stem)
def test_outputs_are_current(page: Path) -> None:
    from qgraph.examples import smollm2_files
    from qgraph.kernels.cpu.library import missing

    if "simd" in page.read_text() and missing():
        pytest.skip(f"{page.name}: simd: {missing()}")
    try:
        made = MAKE["made"](page)
    except smollm2_files.ModelFilesMissing as reason:
        pytest.skip(f"{page.name}: {reason}")
    assert made == page.read_text(), "run `python docs/make_pages.py`"


def test_a_stale_output_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n```text\n3\n```\n")
    assert MAKE["made"](page) == "```python\nprint(1 + 1)\n```\n```text\n2\n```\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_to_pages(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_site() -> None:
    nav = runpy.run_path(str(DOCS / "nav.py"))
    config = (DOCS.parent / "mkdocs.yml").read_text().partition("nav:\n")[2]
    placed = re.findall(r"[\w/-]+\.md", config)
    site = nav["complete"]([{"Guide": placed}])
    assert sorted(nav["_paths"](site)) == sorted(
        str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")
    )


def test_the_reference_names_what_there_is() -> None:
    for name in re.findall(r"^::: (\S+)", (DOCS / "reference.md").read_text(), re.M):
        module, _, attribute = name.rpartition(".")
        if name == "qgraph.tracing.control_flow" or name in (
            "qgraph.quantization.calls",
            "qgraph.passes",
        ):
            module, attribute = name, "__doc__"
        found = __import__(module, fromlist=["x"])
        assert getattr(found, attribute).__doc__ if attribute != "__doc__" else found.__doc__, name


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'qgraph[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install 'qgraph[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WARNING -" not in done.stderr
    reference = (tmp_path / "reference" / "index.html").read_text()
    for name in (
        "qgraph.compiler.api.compile",
        "qgraph.compiler.program.Program.profile",
        "qgraph.inspection.diff.Diff",
    ):
        assert f'id="{name}"' in reference
    assert (tmp_path / "reading-a-plan" / "index.html").exists()
