"""How kernels are timed; that they are is `test_tuner.py`'s."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from qgraph.kernels import Problem
from qgraph.kernels.base import Kernel
from qgraph.kernels.choice import measuring
from qgraph.target import as_target

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
    p = Problem(4, n, 128, mx.float32, "affine", 4, 64, backend="cuda")
    x, parts = measuring.random_operands(p)
    chain = measuring.chains_of(p, ["recorder"], x, parts, CPU)["recorder"]
    chain.turns = 2
    chain()
    assert len(recorder.given) == chain.products == 6
    want = x
    for given in recorder.given:
        assert mx.allclose(given, want).item()
        want = measuring.after(x, mx.quantized_matmul(want, *parts, **p.settings))


def test_an_array_that_waits_is_the_result_where_that_is_large_enough() -> None:
    x = mx.ones((2, 8))
    assert measuring.after(x, mx.arange(20.0).reshape(2, 10)).tolist()[1][0] == 8
    assert mx.array_equal(measuring.after(x, mx.full((2, 8), 3.0)), mx.full((2, 8), 3.0)).item()
    few = measuring.after(x, mx.full((2, 4), 3.0))
    assert (few.shape, few[0, 0].item(), mx.sum(few).item()) == (x.shape, 3, 18)
    assert mx.sum(x).item() == 16
    assert measuring.after(x, mx.ones((2, 8), mx.float16)).dtype == x.dtype


def test_a_chain_is_long_on_a_gpu_and_one_product_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "once", lambda chain: 0.001 * chain.turns)
    long, one = (measuring.Chain(lambda x: [x], mx.ones((2, 2)), length) for length in (4, 1))
    long.lengthen()
    one.lengthen()
    assert 12 <= long.turns <= 20
    assert (long.products, one.products) == (4 * long.turns, 1)


def test_a_chain_of_products_neither_grows_nor_fades() -> None:
    p = Problem(8, 512, 512, mx.float32, "affine", 4, 64)
    x, parts = measuring.random_operands(p)
    y = x
    for _ in range(20):
        y = measuring.after(x, mx.quantized_matmul(y, *parts, **p.settings))
    assert 0.2 < mx.std(y).item() / mx.std(x).item() < 5
