"""Imports point one way, and a wheel has no top-level `passes`."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["types", "ir", "ops", "tensor", "trace", "rewrite", "passes", "lower", "program", "api",
         "cli"]  # fmt: skip
"""Lower layers first: none imports one after it when it is loaded."""


def imports(path: Path) -> set[str]:
    """Modules of qgraph that `path` imports when it is loaded, by their first name."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level == 1 or name.startswith("qgraph."):
                found.add(name.removeprefix("qgraph.").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("qgraph.")}
    return found - {""}


def graph() -> nx.DiGraph:
    result = nx.DiGraph()
    for path in (ROOT / "qgraph").glob("*.py"):
        if path.stem != "__init__":
            result.add_edges_from((path.stem, other) for other in imports(path))
    for path in (ROOT / "passes").glob("*.py"):
        own = {p.stem for p in (ROOT / "passes").glob("*.py")}
        result.add_edges_from(("passes", other) for other in imports(path) if other not in own)
    result.remove_edges_from(nx.selfloop_edges(result))
    return result


def test_there_are_no_cycles() -> None:
    assert not list(nx.simple_cycles(graph()))


@pytest.mark.parametrize("low", ORDER)
def test_imports_point_one_way(low: str) -> None:
    modules = graph()
    if low not in modules:
        pytest.skip(f"{low} is not there")
    above = set(ORDER[ORDER.index(low) + 1 :]) & nx.descendants(modules, low)
    assert not above, f"{low} imports {above}"


def test_passes_are_one_package_however_they_are_reached() -> None:
    import qgraph.passes
    from qgraph.passes import HoistQuantize

    assert qgraph.passes.HoistQuantize is HoistQuantize
    assert (ROOT / "qgraph" / "passes").resolve() == ROOT / "passes"


def test_the_wheel(tmp_path: Path) -> None:
    """Passes and examples are inside qgraph; nothing is beside it."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"qgraph"}
    for wanted in (
        "qgraph/passes/hoist_quantize.py",
        "qgraph/examples/smollm2.py",
        "qgraph/py.typed",
        "qgraph/ops.py",
        "qgraph/viewer/viewer.html",
    ):
        assert wanted in names
    assert len(names) == len(set(names))


def test_without_a_backend_the_import_says_what_to_install(tmp_path: Path) -> None:
    fake = tmp_path / "mlx"
    fake.mkdir()
    (fake / "__init__.py").write_text("")
    (fake / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import qgraph"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'qgraph[cpu]'" in done.stderr
    assert "libmlx.so" in done.stderr
