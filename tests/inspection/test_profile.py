"""Profiles name every node that takes time, with turns and bytes that are right."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.inspection.profile import Profile

W = mx.random.normal((64, 64), key=mx.random.key(0))
X = mx.ones((4, 64))


def profile(fn: Any, *args: Any, **options: Any) -> Profile:
    return qg.compile(fn, *args, target="cpu", **options).profile(*args, repeats=1)


def times(found: Profile) -> dict[str, int]:
    return {row.node.op: row.times for row in found.rows}


def test_straight_line() -> None:
    found = profile(lambda x: qg.tanh(x @ W).reshape(2, 128) * 2, X)
    assert times(found) == {"matmul": 1, "tanh": 1, "multiply": 1}  # a reshape takes no time
    assert [s.label for s in found.stretches] == ["compiled together"]
    assert math.isclose(sum(found.share(row) for row in found.rows), 1)
    assert found.rows == tuple(sorted(found.rows, key=lambda row: -row.seconds))
    assert found.seconds > 0
    assert found.copy_bandwidth > 0
    matmul = next(row for row in found.rows if row.node.op == "matmul")
    nbytes = 4 * (4 * 64 + 64 * 64 + 4 * 64)
    assert matmul.cost.nbytes == nbytes
    assert math.isclose(matmul.bandwidth, nbytes / matmul.seconds)
    assert math.isclose(matmul.estimate, nbytes / found.copy_bandwidth)


def test_loops_count_their_turns() -> None:
    def nested(x: Any) -> Any:
        def outer(i: Any, h: Any) -> Any:
            return qg.fori_loop(0, 3, lambda j, g: qg.tanh(g), h) * 2

        return qg.fori_loop(0, 5, outer, x)

    found = times(profile(nested, X))
    assert (found["tanh"], found["multiply"]) == (15, 5)


def test_a_while_loop_is_counted_on_these_inputs() -> None:
    def doubling(x: Any) -> Any:
        return qg.while_loop(lambda h: h.sum() < 9, lambda h: h * 2, x)

    found = profile(doubling, mx.ones(1))
    assert times(found)["multiply"] == 4  # 1, 2, 4, 8, 16
    assert any("while_loop" in s.label for s in found.stretches)


def test_of_a_branch_only_what_runs_is_timed() -> None:
    def fn(x: Any) -> Any:
        return qg.cond(x.sum() > 0, qg.sin, qg.cos, x)

    assert "sin" in times(profile(fn, X))
    assert "cos" not in times(profile(fn, X))
    assert "cos" in times(profile(fn, -X))


def test_a_scan() -> None:
    def fn(xs: Any) -> Any:
        return qg.scan(lambda c, x: (qg.tanh(c + x), c), qg.zeros((64,)), xs)

    assert times(profile(fn, X))["tanh"] == 4


def test_packed_weights_and_parameters() -> None:
    packing = profile(lambda x: qg.quantized_matmul(x, W), X)
    assert len(packing.rows) == 1  # packing ran before, and is no part of a call

    def call(w: Any, x: Any) -> Any:
        return qg.quantized_matmul(x, w)

    given = qg.compile(call, W, X, parameters=[0], target="cpu").profile(W, X, repeats=1)
    assert len(given.rows) == 1


def test_a_program_compiled_on_call() -> None:
    program = qg.jit(lambda x: qg.tanh(x), target="cpu")
    assert times(program.profile(X, repeats=1)) == {"tanh": 1}


def test_text() -> None:
    found = profile(lambda x: qg.tanh(x @ W) + 1, X)
    text = found.format(top=1)
    assert text.startswith("lambda on cpu")
    assert "as it runs" in text
    assert "2 more nodes" in text
    assert "test_profile.py" in text
    notes = found.graph.format(notes=found.notes())
    assert sum(line.endswith("%") for line in notes.splitlines()) == 3


def test_by_line() -> None:
    def fn(x: Any) -> Any:
        for _ in range(3):
            x = qg.tanh(x)
        return qg.exp(x)

    found = profile(fn, X)
    groups = found.by_line()
    assert {op: len(rows) for (_, op), rows in groups.items()} == {"tanh": 3, "exp": 1}
    sums = [sum(row.seconds for row in rows) for rows in groups.values()]
    assert sums == sorted(sums, reverse=True)
    assert math.isclose(sum(sums), found.total)


def test_the_wrong_inputs_are_refused() -> None:
    program = qg.compile(lambda x: x + 1, X, target="cpu")
    with pytest.raises(qg.errors.InputError):
        program.profile(mx.ones(3))
