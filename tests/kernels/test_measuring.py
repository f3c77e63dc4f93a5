"""How kernels are timed; that they are is `test_tuner.py`'s."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import pytest

from qgraph.kernels import Problem
from qgraph.kernels.base import Kernel
from qgraph.kernels.choice import measuring
from qgraph.target import as_target
from qgraph.timing import CHEAP, interleaved

CPU = as_target("cpu")


class Recorder(Kernel):
    """Multiplies and keeps what it was given; outside of compiled functions."""

    host = True

    def __init__(self) -> None:
        self.given: list[mx.array] = []

    def run(self, x: mx.array, packed: Any, problem: Problem, streams: Any) -> mx.array:
        self.given.append(x)
        return mx.quantized_matmul(x, *packed, **problem.settings)


@pytest.mark.parametrize("n", [64, 256])
def test_products_wait_for_one_another(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(measuring, "kernel", lambda name: recorder)
    monkeypatch.setattr(measuring, "LENGTH", 3)
    monkeypatch.setattr(measuring, "WAITING", 32)
    p = Problem(4, n, 128, mx.float32, "affine", 4, 64, backend="cuda")
    x, parts = measuring.random_operands(p)
    chains = measuring.chains_of(p, ["recorder"], x, parts, CPU)
    chain = chains["recorder"]
    chain.turns = 2
    chain()
    assert len(recorder.given) == chain.length * chain.turns == 6
    want = recorder.given[0]  # of what the chain waited for
    assert not mx.allclose(want, x).item()
    for given in recorder.given:
        assert mx.allclose(given, want).item()
        want = measuring.after(x, mx.quantized_matmul(want, *parts, **p.settings))
    for turns, name in measuring.ALONE.items():
        assert chains[name].turns == turns
        chains[name]()
    assert len(recorder.given) == 6


def test_an_array_that_waits_is_the_result_where_that_is_large_enough() -> None:
    x = mx.ones((2, 8))
    assert measuring.after(x, mx.arange(20.0).reshape(2, 10)).tolist()[1][0] == 8
    y = mx.full((2, 8), 3.0)
    assert measuring.after(x, y) is y
    few = measuring.after(x, mx.arange(6.0).reshape(2, 3))
    assert few.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [2, 3, 4, 5, 0, 1, 2, 3]]
    assert measuring.after(x, mx.ones((2, 8), mx.float16)).dtype == x.dtype


def test_what_a_chain_takes_without_products_is_taken_off() -> None:
    chain = measuring.Chain(lambda x: [x], mx.ones((2, 2)), length=4, turns=2)
    assert measuring._each(chain, 5.0, {2: 1.0, 1: 0.5}) == 0.5
    assert measuring._each(chain, 5.0, {}) == 5 / 8


def test_nothing_is_hopeless_next_to_what_is_no_candidate() -> None:
    runs = {"slow": lambda: time.sleep(1.5 * CHEAP), "empty": lambda: None}
    for beside, times in (((), 1), (("empty",), 3)):
        timings = interleaved(runs, repeats=3, warmup=1, hopeless=6.0, beside=beside)
        assert [len(timing.seconds) for timing in timings.values()] == [times, 3]


def test_a_slow_chain_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = mx.ones((2, 2))
    chains = [measuring.Chain(lambda x: [x], x, 4, before) for before in (lambda: x, None)]
    for seconds, turns in ((0.001, measuring.TURNS), (0.1, 1)):
        monkeypatch.setattr(measuring, "once", lambda _, seconds=seconds: seconds)
        for chain in chains:
            chain.settle()
        assert [chain.turns for chain in chains] == [turns, 1]


def test_a_chain_of_products_neither_grows_nor_fades() -> None:
    p = Problem(8, 512, 512, mx.float32, "affine", 4, 64)
    x, parts = measuring.random_operands(p)
    y = x
    for _ in range(20):
        y = measuring.after(x, mx.quantized_matmul(y, *parts, **p.settings))
    assert 0.2 < mx.std(y).item() / mx.std(x).item() < 5
