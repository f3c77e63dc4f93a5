"""Programs as folders: a graph in JSON, the packed weights beside it, and what it is for.

What is saved is the graph that runs, with packed weights as its constants: loading packs nothing,
and no float weight is read.

A folder is data from strangers.  Digests tell damage; and whatever a file says, each shape, dtype,
size, count and kernel setting is held against the graph before anything runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mlx.core as mx

from ..analysis.indices import stray_index
from ..analysis.verify import verify
from ..errors import QGraphError, writing
from ..inspection.names import Names
from ..inspection.serialize import Arrays, from_json, to_json
from ..inspection.tree_json import unreadable
from ..ir.graph import Graph, Value, constant_value
from ..target import Target, as_target
from . import safetensors
from .executable import Executable
from .guards import guarded

GRAPH, WEIGHTS, ABOUT = "graph.json", "weights.safetensors", "about.json"
FORMAT = 1
"""Changes when a folder written before can no longer be read."""
FIRST = "target.txt"
"""In folders from before there were digests: the backend's name, in the place of `ABOUT`."""


def save(executable: Executable, folder: str | Path) -> Path:
    """Write what runs at each call to a folder; returns the folder.

    Raises:
        QGraphError: the folder cannot be written, or has no form for what the program takes.
    """
    path = Path(folder)
    for what, form in (
        ("an argument", executable.graph.in_tree),
        ("a result", executable.out_tree),
    ):
        if form is not None and (why := unreadable(form)):
            raise QGraphError(f"{executable.graph.name} cannot be saved: of {what}: {why}")
    arrays: Arrays = {}
    text = to_json(packed_graph(executable), arrays)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        (path / GRAPH).write_text(text)
        _save_arrays(path / WEIGHTS, arrays or {"": mx.zeros(0)})
        about = {
            "format": FORMAT,
            "backend": executable.target.backend,
            "sha256": {name: _digest(path / name) for name in (GRAPH, WEIGHTS)},
        }
        (path / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return path


def _save_arrays(path: Path, arrays: Arrays) -> None:
    try:
        mx.save_safetensors(str(path), arrays)
    except RuntimeError as error:  # what MLX makes of a disk that is full
        raise OSError(str(error)) from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: str | Path) -> tuple[Graph, Target]:
    """The graph that `save` wrote, verified, with its arrays, and the target it is for.

    Raises:
        QGraphError: the folder holds no program, a damaged one, or one for a target that is not
            here.
        VerifyError: the graph is none that `save` writes; names the node.
    """
    path = Path(folder)
    about = FIRST if (path / FIRST).is_file() and not (path / ABOUT).exists() else ABOUT
    missing = [name for name in (GRAPH, WEIGHTS, about) if not (path / name).is_file()]
    if missing:
        raise QGraphError(
            f"{path} holds no program: {', '.join(missing)} not found"
            if path.is_dir()
            else f"{path} is a file, and no program's folder"
            if path.exists()
            else f"there is no folder {path}",
            hint="give the folder that program.save(folder) wrote",
        )
    try:
        target = _target(path, (path / FIRST).read_text().strip() if about == FIRST else "")
        graph = from_json((path / GRAPH).read_text(), safetensors.read(path / WEIGHTS))
    except (OSError, UnicodeDecodeError) as error:
        raise QGraphError(f"{path} cannot be read: {error}") from None
    _refuse_stages(graph, path)
    verify(graph)
    if (stray := stray_index(graph)) is not None:
        node, why = stray
        raise QGraphError(f"{path}: {node.op} {why} there", origin=node.origin)
    return guarded(graph), target


def _target(path: Path, backend: str) -> Target:
    """What the program is for, a backend by name; without one as the folder says."""
    backend = backend or _stated_backend(path)
    there = as_target("cpu")
    if backend != "cpu" and mx.is_available(mx.Device(mx.gpu, 0)):
        there = as_target("gpu")
    if there.backend != backend:
        raise QGraphError(f"{path} is a program for {backend}, this machine has {there.backend}")
    return there


def _stated_backend(path: Path) -> str:
    """The backend that the folder names; checks that the files are those that were written."""
    damaged = QGraphError(
        f"{path / ABOUT} does not say what the program is for",
        hint="the folder was damaged, or written by another qgraph: save the program again",
    )
    try:
        about = json.loads((path / ABOUT).read_text())
        version, backend, digests = about["format"], about["backend"], about["sha256"]
        wanted = {name: digests[name] for name in (GRAPH, WEIGHTS)}
    except (KeyError, RecursionError, TypeError, ValueError):
        raise damaged from None
    if version != FORMAT:
        raise QGraphError(f"{path} is of format {version}, this qgraph reads {FORMAT}")
    if backend not in ("cpu", "cuda", "metal"):
        raise damaged
    for name, digest in wanted.items():
        if _digest(path / name) != digest:
            raise QGraphError(
                f"{path / name} is not the file that was written",
                hint="it was cut off, damaged or changed: save the program again",
            )
    return str(backend)


def _refuse_stages(graph: Graph, path: Path) -> None:
    """What is saved runs at each call: nothing is left to pack or to prepare."""
    early = [node for _, node in graph.walk() if node.stage != "run"]
    if early or any(v.node.args["parameter"] for v in graph.inputs):
        raise QGraphError(
            f"{path} holds a graph with steps to pack or to prepare",
            hint="it is no saved program: read it by qg.Graph.from_json, and compile it",
        )


def packed_graph(executable: Executable) -> Graph:
    """The graph that runs at each call, with what was packed as constants."""
    graph = executable.graph
    names = Names(graph)
    replace: dict[Value, Value] = {}
    nodes = []
    for node in graph.nodes:
        if node.stage != "run" or node.op == "constant":
            for value in node.outputs:
                if value in executable.known:
                    name = "" if value.type.shape == () else names[value].lstrip("@%")
                    constant = constant_value(executable.known[value], name, node.origin)
                    replace[value] = constant
                    nodes.append(constant.node)
            continue
        new = node.with_inputs(replace)
        replace.update(zip(node.outputs, new.outputs, strict=True))
        nodes.append(new)
    return graph.replace(nodes=nodes, outputs=[replace.get(v, v) for v in graph.outputs])
