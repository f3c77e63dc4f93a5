"""Programs as folders: a graph in JSON and the packed weights beside it.

What is saved is the graph that runs, with packed weights as its constants: loading packs nothing,
and no float weight is read.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from ..errors import QGraphError
from ..inspection.names import Names
from ..inspection.serialize import Arrays, from_json, to_json
from ..ir.graph import Graph, Value, constant_value
from ..target import Target, as_target
from .executable import Executable

GRAPH, WEIGHTS, ABOUT = "graph.json", "weights.safetensors", "target.txt"


def save(executable: Executable, folder: str | Path) -> Path:
    """Write what runs at each call to a folder; returns the folder."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    arrays: Arrays = {}
    (path / GRAPH).write_text(to_json(packed_graph(executable), arrays))
    mx.save_safetensors(str(path / WEIGHTS), arrays or {"": mx.zeros(0)})
    (path / ABOUT).write_text(f"{executable.target.backend}\n")
    return path


def read(folder: str | Path) -> tuple[Graph, Target]:
    """The graph that `save` wrote, with its arrays, and the target it is for.

    Raises:
        QGraphError: the folder holds no program, or one for a target that is not here.
    """
    path = Path(folder)
    missing = [name for name in (GRAPH, WEIGHTS, ABOUT) if not (path / name).is_file()]
    if missing:
        raise QGraphError(
            f"{path} holds no program: {', '.join(missing)} not found",
            hint="give the folder that program.save(folder) wrote",
        )
    backend = (path / ABOUT).read_text().strip()
    target = as_target("cpu" if backend == "cpu" else "gpu")
    if target.backend != backend:
        raise QGraphError(f"{path} is a program for {backend}, this machine has {target.backend}")
    arrays = mx.load(str(path / WEIGHTS))
    assert isinstance(arrays, dict)
    return from_json((path / GRAPH).read_text(), arrays), target


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
