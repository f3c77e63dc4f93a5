"""Imports point one way, no modules import each other in a circle, and a wheel holds what it must.

Every import counts, those inside functions and under TYPE_CHECKING too, and `passes/` is read where
it lies as `qgraph.passes`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[2]
FLOORS: tuple[set[str], ...] = (
    {"errors", "origin", "tree", "types", "target", "mesh", "timing", "version"},
    {"kernels"},
    {"ir"},
    {"tracing"},
    {"quantization", "rewrite", "analysis"},
    {"importer", "inspection"},
    {"passes", "runtime"},
    {"compiler", "fitting"},
    {"cli", "lm"},
    {"__init__"},
)
"""Rooms from the ground up: a module imports from its own room, its own floor and those below."""


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def modules() -> dict[str, Path]:
    """Every module of qgraph with its file; the links in `qgraph/` are followed once."""
    found = {}
    for folder, package in ((ROOT / "qgraph", "qgraph"), (ROOT / "passes", "qgraph.passes")):
        for path in folder.rglob("*.py"):
            inner = path.relative_to(folder)
            if package == "qgraph" and (folder / inner.parts[0]).is_symlink():
                continue
            parts = [package, *inner.with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of qgraph that `path`, which is module `name`, imports anywhere in its text."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:  # `from . import errors` names a module, not a definition
                inner = f"{base}.{alias.name}"
                if inner in known:
                    yield inner
                elif base in known:
                    yield base


def graph() -> nx.DiGraph:
    known = modules()
    result = nx.DiGraph()
    result.add_nodes_from(known)
    for name, path in known.items():
        result.add_edges_from((name, other) for other in imported(name, path, known))
    result.remove_edges_from(list(nx.selfloop_edges(result)))
    return result


def circles(imports: nx.DiGraph) -> list[list[str]]:
    return [sorted(c) for c in nx.strongly_connected_components(imports) if len(c) > 1]


def upward(imports: nx.DiGraph) -> list[tuple[str, str]]:
    return [(a, b) for a, b in imports.edges if floor(a) < floor(b)]


def between_rooms(imports: nx.DiGraph) -> nx.DiGraph:
    return nx.DiGraph((room(a), room(b)) for a, b in imports.edges if room(a) != room(b))


def test_every_module_is_in_a_room() -> None:
    known = set().union(*FLOORS)
    assert {room(module) for module in modules()} <= known


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not circles(graph())


def test_no_module_imports_from_a_floor_above() -> None:
    assert not upward(graph())


def test_no_rooms_import_each_other_in_a_circle() -> None:
    assert not circles(between_rooms(graph()))


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("qgraph.ir.graph", "from ..inspection.text import Format"),
        ("qgraph.ir.graph", "def f():\n    from ..inspection.text import Format"),
        ("qgraph.passes.shared.casts", "from qgraph.compiler import pipeline"),
        ("qgraph.types", "if TYPE_CHECKING:\n    from .ir.graph import Graph"),
    ],
)
def test_the_guards_see_an_import_upward(place: str, line: str, tmp_path: Path) -> None:
    """Anywhere in the text; the file is a copy with one line more."""
    known = modules()
    changed = tmp_path / "changed.py"
    changed.write_text(f"{known[place].read_text()}\n{line}\n")
    imports = graph()
    imports.add_edges_from((place, other) for other in imported(place, changed, known))
    assert upward(imports)
    assert circles(imports)


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
    folders = {"qgraph": "qgraph", "passes": "qgraph/passes", "examples": "qgraph/examples"}
    wanted = {
        f"{there}/{path.relative_to(ROOT / here).as_posix()}"
        for here, there in folders.items()
        for path in (ROOT / here).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= set(names)  # code, tables, sources of kernels, the page
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
