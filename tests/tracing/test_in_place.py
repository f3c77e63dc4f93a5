"""Operators that change a tensor in place change it for all who hold it, as in MLX, or are refused.

Each function is run on arrays by MLX and on tensors through a program.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph as qg
from qgraph.compiler.first_difference import values
from qgraph.errors import ShapeError, TraceError

STATEMENTS = [
    "y += 3", "y -= 3", "y *= 3", "y //= 2", "y %= 2", "y **= 2", "y &= 6", "y |= 8", "y ^= 3",
    "y <<= 1", "y >>= 1", "y[0] = 9", "y += 0.5", "y += a", "y *= a", "y @= m", "y = y + 1",
    "y = +y if False else y\ny += 1",
]  # fmt: skip


def same_as_mlx(fn: Callable[..., Any], *args: mx.array) -> None:
    found = qg.compile(fn, *args, target="cpu", passes=[])(*args)
    wanted = fn(*(a + 0 for a in args))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize("statement", STATEMENTS)
def test_an_alias_sees_what_an_operator_changes(statement: str) -> None:
    scope: dict[str, Any] = {}
    body = "\n    ".join(["y = x", *statement.split("\n"), "return x, y"])
    exec(f"def fn(x, a, m):\n    {body}", scope)
    x, a = mx.array([3, 4, 5]), mx.array([1, 2, 3])
    m = mx.eye(3)
    if statement == "y @= m":
        x = x.astype(mx.float32)
    same_as_mlx(scope["fn"], x, a, m)


def test_division_in_place_keeps_the_dtype() -> None:
    def fn(x: Any) -> Any:
        y = x
        y /= 2
        return x, y

    same_as_mlx(fn, mx.array([3.0, 4.0]))
    with pytest.raises(ShapeError, match="/= would change the dtype of i32"):
        qg.trace(fn, qg.spec((2,), mx.int32))


def test_what_at_was_taken_of_does_not_change() -> None:
    def fn(x: Any) -> Any:
        place = x.at[0]
        x += 1
        return x, place.add(10)

    same_as_mlx(fn, mx.array([3.0, 4.0]))


def test_an_array_made_in_the_trace_is_another_constant_once_it_changed() -> None:
    def fn(x: Any) -> Any:
        c = mx.array([1.0, 2.0])
        before = x + c
        c += 1
        between = x + c
        c[0] = 7
        return before, between, x + c

    same_as_mlx(fn, mx.array([3.0, 4.0]))


def test_a_lazy_tensor_holds_the_elements_it_was_made_of() -> None:
    a = mx.array([1.0, 2.0])
    t = qg.tensor(a)
    a += 1
    assert t.eval().tolist() == [1.0, 2.0]
    u = qg.tensor(t)
    u += 1
    assert t.eval().tolist() == [1.0, 2.0]


STATE = SimpleNamespace(count=mx.array([1.0]))


def add_to_state(x: Any) -> Any:
    STATE.count += 1
    return x + STATE.count


def set_in_loop(x: Any) -> Any:
    total = x * 0

    def body(i: Any, h: Any) -> Any:
        nonlocal total
        total += 1
        return h

    return qg.fori_loop(0, 3, body, x) + total


def set_in_branch(x: Any) -> Any:
    seen = x * 0

    def then() -> Any:
        seen[0] = 1
        return x

    return qg.cond(x[0] > 0, then, lambda: x + 1) + seen


def set_captured_in_loop(x: Any) -> Any:
    total = mx.zeros(1)

    def body(i: Any, h: Any) -> Any:
        total[0] = total[0] + 1
        return h + total

    return qg.fori_loop(0, 3, body, x)


@pytest.mark.parametrize("fn", [add_to_state, set_in_loop, set_in_branch, set_captured_in_loop])
def test_what_was_there_before_is_not_changed_in_a_trace(fn: Any) -> None:
    with pytest.raises(TraceError, match="changed in place") as caught:
        qg.trace(fn, qg.spec((1,)))
    assert "test_in_place.py" in str(caught.value)
    assert STATE.count.tolist() == [1.0]


def test_bodies_change_what_is_theirs() -> None:
    def fn(x: Any) -> Any:
        def body(i: Any, h: Any) -> Any:
            k = h
            k += 1
            h[0] = 5
            return h

        return [qg.fori_loop(0, 3, body, x), x]

    same_as_mlx(fn, mx.array([3.0, 4.0]))


def test_loops_on_arrays_leave_what_they_start_from() -> None:
    def add_one(h: Any) -> Any:
        h += 1
        return h

    x = mx.array([0.0])
    assert qg.fori_loop(0, 3, lambda i, h: add_one(h), x).tolist() == [3.0]
    assert qg.while_loop(lambda h: h[0] < 3, add_one, x).tolist() == [3.0]
    assert qg.cond(mx.array(True), add_one, add_one, x).tolist() == [1.0]
    assert qg.scan(lambda h, y: (add_one(h), y), x, mx.ones((3,)))[0].tolist() == [3.0]
    assert x.tolist() == [0.0]


def test_patterns_may_be_written_in_place() -> None:
    def pattern(x: Any, y: Any) -> Any:
        x *= y
        return x

    rule = qg.rewrite.Rule("times", pattern, lambda x, y: x - y)
    graph = qg.rewrite.ApplyRules([rule])(
        qg.trace(lambda a, b: a * b, qg.spec((2,)), qg.spec((2,)))
    )
    assert [n.op for n in graph.nodes] == ["subtract"]


CHANGES: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a.__iadd__(b), lambda a, b: a.__imul__(b), lambda a, b: a.__isub__(1),
    lambda a, b: a.__setitem__(0, b[1]), lambda a, b: a.__setitem__(slice(1, None), 2),
    lambda a, b: a.__setitem__(mx.array([2, 0]), b[:2]), lambda a, b: a.__ipow__(2),
]  # fmt: skip
MADE: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a, lambda a, b: a + b, lambda a, b: a[::-1], lambda a, b: a.reshape(4, 1)[:, 0],
    lambda a, b: a.at[1].add(b[0]), lambda a, b: a.astype(mx.int32),
]  # fmt: skip
STEPS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 9), st.integers(0, 9)), max_size=8
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.booleans())
def test_random_aliases(steps: list[tuple[bool, int, int, int]], captured: bool) -> None:
    def fn(x: Any, y: Any) -> Any:
        held = [x, y, *([mx.array([5, 6, 7, 8])] if captured else [])]
        known = [False, False, True][: len(held)]
        for change, which, i, j in steps:
            i, j = i % len(held), j % len(held)
            made = MADE[which % len(MADE)]
            if known[i] and not known[j]:  # an array is not changed by a tensor
                continue
            if not change:
                held.append(made(held[i], held[j]))
                known.append(known[i] and (known[j] or made not in (MADE[1], MADE[4])))
            else:
                CHANGES[which](held[i], held[j])
        return held

    x, y = mx.array([1, 2, 3, 4]), mx.array([9, 8, 7, 6])
    graph = qg.optimize(qg.trace(fn, x, y), target="cpu").graph
    env = values(graph, [x, y], mx.Device(mx.cpu, 0))
    for value, array in zip(graph.outputs, fn(x + 0, y + 0), strict=True):
        assert env[value].tolist() == array.tolist()
