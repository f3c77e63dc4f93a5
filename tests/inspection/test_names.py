"""Names of values: made at print time, always the same, never twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.inspection.names import Names, literal

W = mx.ones((64, 64))


def graph() -> qg.Graph:
    def fn(x: Any) -> Any:
        first = qg.fori_loop(0, 3, lambda i, h: h @ W + 1, x)
        second = qg.fori_loop(0, 4, lambda i, h: qg.tanh(h), first)
        return qg.quantized_matmul(second, W)

    return qg.optimize(qg.trace(fn, qg.spec((1, 64))), target="cpu").graph


def values(found: qg.Graph) -> list[Any]:
    return [v for _, node in found.walk() for v in node.outputs]


def test_no_name_twice() -> None:
    found = graph()
    names = Names(found)
    counts = Counter(names[v] for v in values(found) if v.shape != ())
    assert max(counts.values()) == 1
    assert "<not in this graph>" not in counts


def test_names_by_what_values_are() -> None:
    found = graph()
    names = {Names(found)[v] for v in values(found)}
    assert {"@W", "W_q", "W_s", "W_b", "%h", "%h_2", "1"} <= names


def test_the_same_graph_gets_the_same_names() -> None:
    found = graph()
    assert [Names(found)[v] for v in values(found)] == [Names(found)[v] for v in values(found)]


@pytest.mark.parametrize(
    ("word", "name"), [("%h", "%h"), ("%h_2", "%h_2"), ("W", "@W"), ("x", "x")]
)
def test_find_is_the_way_back(word: str, name: str) -> None:
    names = Names(graph())
    assert names[names.find(word)] == name


def test_find_nothing() -> None:
    with pytest.raises(qg.errors.InputError, match="no value is called 'W_z'") as caught:
        Names(graph()).find("W_z")
    assert "W_" in caught.value.hint


@pytest.mark.parametrize("number", [0.1, 1 / 3, 1e-7, 3e38, -0.0, float("inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_literals_come_back_as_they_were(number: float, dtype: mx.Dtype) -> None:
    array = mx.array(number, dtype)
    text = literal(array)
    again = np.array(text).astype(np.array(array).dtype)
    assert np.array_equal(again, np.array(array))


def test_literals() -> None:
    words = [literal(mx.array(n)) for n in (3, True, 2.0, 0.5)]
    assert words == ["3", "True", "2", "0.5"]
    assert literal(mx.array(0.1, mx.bfloat16)) == "0.1001"


def test_numbers_that_were_let_go_have_a_name() -> None:
    found = qg.trace(lambda x: x * 2, qg.spec((4,)))
    assert "multiply(x, 2)" in str(found)
    found.constants()[0].args["data"].release()
    assert "multiply(x, @c0)" in str(found)
