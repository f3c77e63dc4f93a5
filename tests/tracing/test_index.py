"""Lists in an index are the arrays that MLX takes them for; tuples are an index for each axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.errors import QGraphError

X = mx.random.normal((4, 3, 5), key=mx.random.key(0))
IDS = mx.array([2, 0])


def put(x: Any) -> Any:
    y = x * 1
    y[[0, 2]] = x[[1, 3]]
    y[1:, [0, 2]] = 0.5
    return y


INDEXED: dict[str, Callable[[Any], Any]] = {
    "rows": lambda x: x[[0, 2]],
    "one of a vector": lambda x: x[0, 0][[1, -1]],
    "nested": lambda x: x[[[0, 1], [1, 2]]],
    "beside a number": lambda x: x[[0, 2], 1],
    "two lists": lambda x: x[[0, 2], [1, 0]],
    "after a slice": lambda x: x[1:, [0, 2]],
    "with an ellipsis": lambda x: x[..., [4, 0]],
    "with a new axis": lambda x: x[None, [1]],
    "a tuple is an index for each axis": lambda x: x[(0, 1)],
    "of arrays": lambda x: x[[IDS[0], IDS[1]]],
    "added to": lambda x: x.at[[0, 2]].add(1.0),
    "a row apart": lambda x: x.at[1, [0, 2]].multiply(3.0),
    "put": put,
}


@pytest.mark.parametrize("name", INDEXED)
def test_a_list_in_an_index_is_an_array(name: str) -> None:
    fn = INDEXED[name]
    assert mx.array_equal(qg.compile(fn, X, target="cpu")(X), fn(X))


def test_on_arrays_alone_too() -> None:
    assert mx.array_equal(qg.getitem(X, [0, 2]), X[[0, 2]])
    assert mx.array_equal(qg.getitem(X, (0, 2)), X[0, 2])


def test_a_list_of_tensors() -> None:
    program = qg.compile(lambda x, i: x[[i[0], i[1]]], X, IDS, target="cpu")
    assert mx.array_equal(program(X, IDS), X[IDS])


def test_an_array_takes_a_tensor_for_an_index() -> None:
    """`table[ids]`, as embeddings are written: the table is a constant under its name."""
    table = mx.random.normal((10, 6), key=mx.random.key(1))
    graph = qg.trace(lambda ids: table[ids], IDS)
    assert [node.args["name"] for node in graph.constants()] == ["table"]
    assert mx.array_equal(qg.compile(graph, target="cpu")(IDS), table[IDS])


@pytest.mark.parametrize("index", [[0.5], [], ["a"], [slice(0, 2)]])
def test_what_is_no_index_is_refused(index: Any) -> None:
    with pytest.raises(QGraphError):
        qg.trace(lambda x: x[index], X)
