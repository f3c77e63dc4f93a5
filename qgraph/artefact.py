"""Programs as folders: a graph in JSON and the packed weights beside it.

What is saved is the graph that runs, with packed weights as its constants: loading packs nothing,
and no float weight is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from .errors import QGraphError
from .ir import Graph, Value, constant_value
from .names import Names
from .pipeline import optimize
from .serialize import Arrays, from_json, to_json
from .target import as_target

if TYPE_CHECKING:
    from .program import Executable, Program

GRAPH, WEIGHTS, ABOUT = "graph.json", "weights.safetensors", "target.txt"


def save_program(program: Program, folder: str | Path) -> Path:
    """Write a program with one specialisation to a folder; returns the folder.

    Raises:
        QGraphError: the program has parameters, or several specialisations.
    """
    if len(program.executables) != 1:
        raise QGraphError(
            f"the program has {len(program.executables)} specialisations",
            hint="save one that qg.compile made for the types it will be called with",
        )
    executable = program.executables[0]
    if executable.parameters:
        raise QGraphError(
            "the program has parameters, which are not saved with it",
            hint="compile it with the weights as constants",
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    arrays: Arrays = {}
    (path / GRAPH).write_text(to_json(packed_graph(executable), arrays))
    mx.save_safetensors(str(path / WEIGHTS), arrays or {"": mx.zeros(0)})
    (path / ABOUT).write_text(f"{executable.plan.target.backend}\n")
    return path


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


def load(folder: str | Path) -> Program:
    """The program that `Program.save` wrote.

    Raises:
        QGraphError: the folder holds no program, or one for a target that is not here.

    >>> import tempfile, mlx.core as mx, qgraph as qg
    >>> program = qg.compile(lambda x: qg.tanh(x) + 1, qg.spec((4,)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = qg.load(program.save(folder))
    ...     mx.array_equal(again(mx.ones(4)), program(mx.ones(4))).item()
    True
    """
    from .program import Program

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
    graph = from_json((path / GRAPH).read_text(), arrays)
    return Program(None, optimize(graph, target=target, passes=[]))
