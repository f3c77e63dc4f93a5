"""Graphs survive JSON: same text, same structure, same numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.analysis.verify import verify
from qgraph.errors import QGraphError
from qgraph.examples import smollm2_files as files
from qgraph.examples.smollm2 import Llama
from qgraph.inspection.serialize import from_json, to_json
from qgraph.types import DTYPES

W = mx.random.normal((256, 256), key=mx.random.key(0)) / 16
Q = mx.quantize(W)
X = mx.random.normal((2, 256), key=mx.random.key(1))


def loops(x: Any) -> Any:
    def body(i: Any, carry: Any) -> Any:
        h, n = carry["h"], carry["n"]
        h = qg.cond(qg.sum(h) > 0, lambda h: h * 0.5, lambda h: h + W[0], h)
        return {"h": qg.tanh(qg.quantized_matmul(h, W)), "n": n + i}

    out = qg.fori_loop(0, 3, body, {"h": x, "n": mx.array(0)})
    y, ys = qg.scan(lambda c, s: (c + s, (c, None)), out["h"], qg.ones((2, 256)), reverse=True)
    return qg.while_loop(lambda h: h.sum() < 0, lambda h: h + 1, y), [ys], out["n"], 3


def arguments(x: Any) -> Any:
    return {
        "index": x[..., None, 1:5:2, ::-1][0],
        "lookup": x[:, mx.array([1, 2])],
        "dtype": x.astype(mx.bfloat16) + 1.5,
        "where": qg.where(x > float("-inf"), x, 2j),
        "device": qg.exp(x, stream="cpu"),
        "at": x.at[0, 1:3].add(2.0),
        "several": qg.split(x, [3, 7], axis=1),
        "fused": x @ qg.dequantize(*Q).T,
        "numbers": qg.arange(5, dtype=mx.int8),
    }


PROGRAMS: dict[str, Callable[[Any], Any]] = {"loops": loops, "arguments": arguments}


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_round_trip(name: str, optimized: bool, embedded: bool) -> None:
    graph = qg.trace(PROGRAMS[name], X)
    graph = qg.optimize(graph, target="cpu").graph if optimized else graph
    arrays: dict[str, mx.array] | None = None if embedded else {}
    text = to_json(graph, arrays)
    json.loads(text)
    again = from_json(text, arrays)
    verify(again)
    assert str(again) == str(graph)
    assert to_json(again, None if embedded else {}) == text
    assert (again.in_tree, again.out_tree) == (graph.in_tree, graph.out_tree)
    expected = qg.tree.flatten(qg.compile(graph, passes=[], target="cpu")(X), static=True)[0]
    actual = qg.tree.flatten(qg.compile(again, passes=[], target="cpu")(X), static=True)[0]
    assert all(mx.array_equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(), (2,), (0, 3)])
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_embedded_constants_are_the_same_to_the_bit(
    dtype: mx.Dtype, shape: tuple[int, ...]
) -> None:
    size = math.prod(shape) * dtype.size
    bits = mx.arange(size, dtype=mx.uint8) % 2 if dtype == mx.bool_ else 200 - mx.arange(size) * 3
    array = mx.view(bits.astype(mx.uint8).reshape(-1), dtype).reshape(shape)
    graph = qg.trace(lambda x: x + qg.tensor(array).astype(mx.float32), qg.spec(()))
    (again,) = (n for n in from_json(to_json(graph)).constants() if n.output.type.dtype == dtype)
    kept = again.args["data"].array
    assert kept.shape == shape
    assert mx.array_equal(mx.view(kept.reshape(-1), mx.uint8), bits.astype(mx.uint8)).item()


def test_a_model() -> None:
    toy = files.toy()
    llama = Llama(toy.config, toy.weights, length=32)
    state = (mx.array(5), mx.array(0), mx.random.key(0), llama.empty_cache())
    graph = qg.optimize(qg.trace(llama.decode(4), *state)).graph
    arrays: dict[str, mx.array] = {}
    assert str(from_json(to_json(graph, arrays), arrays)) == str(graph)


@pytest.mark.parametrize("text", ["", "[]", "{}", '"text"', '{"format": 999, "graph": {}}'])
def test_bad_text(text: str) -> None:
    with pytest.raises(QGraphError, match=r"not a graph in JSON|format 999"):
        from_json(text)


def test_missing_arrays() -> None:
    text = to_json(qg.trace(lambda x: x @ W, X), {})
    with pytest.raises(QGraphError, match=r"array '0\.W' of a constant is not there"):
        from_json(text)


def test_methods_of_a_graph(tmp_path: Path) -> None:
    graph = qg.trace(loops, X)
    assert str(qg.Graph.from_json(graph.to_json())) == str(graph)
    for suffix, start in ((".json", "{"), (".txt", "graph loops(")):
        path = graph.save(tmp_path / f"graph{suffix}")
        assert path.read_text().startswith(start)
    with pytest.raises(ValueError, match=r"\.pdf"):
        graph.save(tmp_path / "graph.pdf")


def test_programs_are_saved_packed(tmp_path: Path) -> None:
    program = qg.compile(loops, X, target="cpu")
    folder = program.save(tmp_path / "program")
    again = qg.load(folder)
    for a, b in zip(
        qg.tree.flatten(program(X), static=True)[0],
        qg.tree.flatten(again(X), static=True)[0],
        strict=True,
    ):
        assert mx.array_equal(a, b)
    stored: Any = mx.load(str(folder / "weights.safetensors"))
    assert not any(tuple(a.shape) == (256, 256) for a in stored.values())
    assert {n.op for _, n in again.plan.graph.walk()}.isdisjoint({"quantize", "pack_weight"})


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    with pytest.raises(QGraphError, match="0 specialisations"):
        qg.jit(loops).save(tmp_path)
    program = qg.compile(lambda w, x: x @ w, W, X, parameters=[0])
    with pytest.raises(QGraphError, match="parameters"):
        program.save(tmp_path)
    with pytest.raises(QGraphError, match="there is no folder"):
        qg.load(tmp_path / "nothing")
