"""Arguments that are handed over: written in place, and gone for the caller."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.errors import InputError

LENGTH = 1 << 20


def store(x: Any, at: Any, cache: Any) -> Any:
    """Puts x into a buffer, and gives what is there now and the sum of a part of it."""
    (buffer, *rest) = cache
    buffer = qg.slice_update(buffer, x, at.reshape(1), axes=(0,))
    return qg.sum(buffer[:8]), [buffer, *rest]


def given() -> tuple[mx.array, mx.array, list[mx.array]]:
    cache = [mx.zeros((LENGTH, 8)), mx.ones((2,))]
    mx.eval(cache)
    return mx.full((1, 8), 2.0), mx.array(3), cache


def peak(program: qg.Program, args: Any) -> int:
    """Bytes that a call takes beside what is there already."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    total, cache = program(*args)
    mx.eval(total, cache)
    assert total.item() == 16
    assert cache[0][3].tolist() == [2.0] * 8
    assert cache[0].sum().item() == 16
    return mx.get_peak_memory() - before


def test_a_donated_buffer_is_written_in_place() -> None:
    size = LENGTH * 8 * 4
    args = given()
    kept = qg.compile(store, *args, target="cpu")
    assert peak(kept, args) >= size
    assert args[2][0].sum().item() == 0  # the caller's own, as it was
    donated = qg.compile(store, *args, target="cpu", donate=[2])
    assert peak(donated, args) < size / 2
    assert args[2] == []


def test_jit_and_nested_containers() -> None:
    def step(x: Any, state: Any) -> Any:
        return {"a": state["layers"][0][0] + x, "b": state["layers"][0][1]}

    program = qg.jit(step, donate=[1], target="cpu")
    state = {"layers": [(mx.array([1.0]), mx.array([2.0]))]}
    layers = state["layers"]
    after = program(mx.array([5.0]), state)
    assert after["a"].tolist() == [6.0]
    assert after["b"].tolist() == [2.0]
    assert not state
    assert not layers


def test_an_array_itself_cannot_be_taken() -> None:
    program = qg.jit(lambda x: qg.exp(x), donate=[0], target="cpu")
    with pytest.raises(InputError, match="argument 0 is donated") as caught:
        program(mx.zeros(4))
    assert "in a list" in caught.value.hint
