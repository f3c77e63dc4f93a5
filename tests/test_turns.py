"""Compiled stretches and products from the host take turns, as few as the graph allows."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg
from qgraph.lower import HostKernel, LoweredGraph, Stretch
from qgraph.passes import ChooseKernel, HoistQuantize
from qgraph.target import as_target
from tests import reference
from tests.arrays import to_numpy
from tests.compiler import needs_compiler

CPU = as_target("cpu")
N = 1024
WEIGHTS = [mx.random.normal((N, N), key=mx.random.key(i)) / N**0.5 for i in range(4)]
PACKED = [mx.quantize(w, group_size=64, bits=4) for w in WEIGHTS]
DENSE = [
    reference.dequantize(*map(to_numpy, p), 64, 4, "affine").astype(np.float64) for p in PACKED
]
X = mx.random.normal((2, N), key=mx.random.key(9))

pytestmark = needs_compiler


def block(x: Any) -> Any:
    """Three products of one input, written with work between them, and one of their results."""
    first, second, third, last = ((lambda y, p=p: qg.quantized_matmul(y, *p)) for p in PACKED)
    y = qg.tanh(x)
    a = qg.sin(first(y))
    b = a + qg.cos(second(y))
    return qg.exp(-qg.abs(last(b * third(y)))), a


def expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w = [dense.T for dense in DENSE]
    y = np.tanh(x)
    a = np.sin(y @ w[0])
    return np.exp(-np.abs(((a + np.cos(y @ w[1])) * (y @ w[2])) @ w[3])), a


def steps(lowered: LoweredGraph) -> list[type]:
    return [type(step) for step in lowered.steps]


def test_products_of_one_input_run_one_after_the_other() -> None:
    program = qg.compile(block, X, passes=[ChooseKernel(CPU)], target="cpu")
    (executable,) = program.executables
    assert isinstance(executable.run, LoweredGraph)
    assert steps(executable.run) == [Stretch, *[HostKernel] * 3, Stretch, HostKernel, Stretch]
    for got, want in zip(program(X), expected(to_numpy(X).astype(np.float64)), strict=True):
        assert reference.relative_error(to_numpy(got), want) < 1e-5


def test_in_a_loop_and_with_parameters() -> None:
    def fn(ws: Any, x: Any) -> Any:
        def turn(_: Any, y: Any) -> Any:
            for w in ws:
                y = qg.tanh(qg.quantized_matmul(y, w))
            return y

        return qg.fori_loop(0, 3, turn, x)

    passes = [HoistQuantize(), ChooseKernel(CPU), HoistQuantize()]
    program = qg.compile(fn, WEIGHTS[:2], X, parameters=[0], passes=passes, target="cpu")
    kernels = [n.kernel for _, n in program.plan.graph.walk() if n.kernel]
    assert kernels == ["simd", "simd"]
    y = to_numpy(X).astype(np.float64)
    for _ in range(3):
        for dense in DENSE[:2]:
            y = np.tanh(y @ dense.T)
    assert reference.relative_error(to_numpy(program(WEIGHTS[:2], X)), y) < 1e-5
    assert reference.relative_error(to_numpy(program(program.prepare(WEIGHTS[:2]), X)), y) < 1e-5


def test_casts_of_scales_are_packed_once() -> None:
    """They are no part of a turn, though the kernel could read half precision."""
    half = [p if p.dtype == mx.uint32 else p.astype(mx.float16) for p in PACKED[0]]

    def fn(x: Any) -> Any:
        w, *scales = half
        product = lambda i, y: qg.quantized_matmul(  # noqa: E731
            qg.tanh(y), w, *(qg.tensor(s).astype(mx.float32) for s in scales)
        )
        return qg.fori_loop(0, 4000, product, x)

    plan = qg.optimize(qg.trace(fn, X), passes=[ChooseKernel(CPU), HoistQuantize()])
    stages = {n.stage for _, n in plan.graph.walk() if n.op == "astype"}
    assert stages == {"pack"}
