"""Artefacts to damage, and what must hold of a damaged one, whatever its files say.

An artefact as it came, with the digests of what was written, is the same program or refused.  One
that is signed anew is what a stranger could write: refused in words, or a program whose results are
those of its own graph, run node by node by MLX's ops.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg
from qgraph.cli.sources import example_call, example_inputs
from qgraph.errors import QGraphError
from qgraph.ir import Graph
from qgraph.passes import FormRegions
from qgraph.runtime.artefact import ABOUT, GRAPH, WEIGHTS
from qgraph.runtime.by_mlx import by_mlx, run_by_mlx
from qgraph.runtime.executable import Executable
from tests.fuzz.surface import in_words

W = mx.random.normal((64, 64), key=mx.random.key(0)) / 8
X = mx.random.normal((2, 64), key=mx.random.key(1))
MOST_TURNS, MOST_BYTES = 1000, 1 << 24

Files = dict[str, bytes]


def loops(x: Any) -> Any:
    h = qg.fori_loop(0, 3, lambda i, h: qg.tanh(qg.quantized_matmul(h, W)), x)
    h, ys = qg.scan(lambda c, s: (c + s, c), h, qg.ones((2, 64)))
    return {"h": h, "ys": ys[:, ::2]}


def layers(x: Any) -> Any:
    h = qg.fast.rms_norm(x, qg.tensor(W)[0], 1e-5)
    h = qg.concatenate([h, qg.quantized_matmul(h, W)], axis=1)
    heads = qg.expand_dims(h.reshape(2, 2, 64), 0)
    a = qg.fast.scaled_dot_product_attention(heads, heads, heads, scale=0.125)
    return qg.cond(a.sum() > 0, lambda h: qg.sum(h, axis=-1), lambda h: qg.max(h, axis=-1), a)


def search(x: Any) -> Any:
    return qg.while_loop(lambda h: h.sum() < 100, lambda h: h + qg.abs(x @ W), x)


def small(x: Any) -> Any:
    return x * 2 + 1


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "loops": loops,
    "layers": layers,
    "search": search,
    "small": small,
    "region": layers,
}


@cache
def compiled(name: str) -> qg.Program:
    passes = [*qg.default_passes(qg.as_target("cpu"))]
    if name == "region":
        passes.append(FormRegions(everywhere=True))
    return qg.compile(PROGRAMS[name], X, target="cpu", passes=passes)


@cache
def saved(name: str) -> Files:
    """The files of an artefact."""
    with tempfile.TemporaryDirectory() as folder:
        path = compiled(name).save(folder)
        return {file: (path / file).read_bytes() for file in (GRAPH, WEIGHTS, ABOUT)}


@cache
def answer(name: str) -> list[mx.array]:
    return _leaves(compiled(name)(X))


def _leaves(tree: Any) -> list[mx.array]:
    leaves: list[mx.array] = qg.tree.flatten(tree)[0]
    mx.eval(leaves)
    return leaves


def write(folder: Path, files: Files, sign: bool) -> None:
    files = dict(files)
    if sign:
        about = json.loads(files[ABOUT])
        about["sha256"] = {n: hashlib.sha256(files[n]).hexdigest() for n in (GRAPH, WEIGHTS)}
        files[ABOUT] = json.dumps(about).encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def outcome(name: str, files: Files, *, sign: bool) -> str:
    """Load the damaged files and run what comes: "refused", "same", "own" or "loaded".

    Raises:
        AssertionError: another answer than the right one.
        Exception: any that is not a documented one.
    """
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), files, sign)
        try:
            program = qg.load(folder)
        except QGraphError as error:
            in_words(error)
            return "refused"
    graph = program.plan.graph
    if not sign:
        _equal(_leaves(program(X)), answer(name), 0)
        return "same"
    if _is_much(graph):
        return "loaded"
    try:
        found = _leaves(program(*example_call(graph)))
    except QGraphError:
        return "refused"
    _equal(found, meaning(program.executables[0]), 1e-4)
    return "own"


def meaning(executable: Executable) -> list[mx.array]:
    """The results of the graph for example inputs, node by node by MLX's own ops."""
    graph = by_mlx(executable.graph)
    device = executable.target.device
    with mx.stream(device):
        found = run_by_mlx(graph, executable.known, device, example_inputs(graph))
        mx.eval(found)
    return found


def _is_much(graph: Graph) -> bool:
    """Does it say itself that it runs for long, or does nobody know when it ends?"""
    for _, node in graph.walk():
        args = node.args
        if node.op in ("fori_loop", "scan"):
            turns = args["length"] if node.op == "scan" else _turns(args["lower"], args["upper"])
            if turns > MOST_TURNS:
                return True
        if node.op == "while_loop" or any(v.type.nbytes > MOST_BYTES for v in node.outputs):
            return True
    return False


def _turns(lower: Any, upper: Any) -> float:
    known = isinstance(lower, int) and isinstance(upper, int)
    return upper - lower if known else float("inf")


def _equal(found: list[mx.array], wanted: list[mx.array], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{a.dtype} {a.shape} for {b.dtype}"
        one, other = (np.array(x.astype(mx.complex64)) for x in (a, b))
        finite = np.abs(other[np.isfinite(other)])
        most = float(finite.max()) if finite.size else 0.0
        same = np.allclose(one, other, 0, tolerance * most, equal_nan=True)
        assert same, f"a wrong answer: {a} for {b}"
