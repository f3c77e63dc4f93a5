"""Compiled stretches and products from the host take turns, as few as the graph allows."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.kernels.choice.tuner import Choice
from qgraph.passes import ChooseKernel, EliminateDeadCode, HoistQuantize
from qgraph.runtime.lower import HostKernel, LoweredGraph, Stretch
from qgraph.target import as_target
from tests.support import reference
from tests.support.arrays import to_numpy
from tests.support.compiler import needs_compiler

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
    assert steps(executable.lowered) == [Stretch, *[HostKernel] * 3, Stretch, HostKernel, Stretch]
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


def halved(scales: list[mx.array]) -> Any:
    """A product in a loop by scales in half precision, cast up where they are read."""

    def turn(_: Any, y: Any) -> Any:
        wide = [qg.tensor(s).astype(mx.float32) for s in scales]
        return qg.quantized_matmul(qg.tanh(y), PACKED[0][0], *wide)

    def fn(x: Any) -> Any:
        return qg.fori_loop(0, 3, turn, x)

    return fn


@pytest.mark.parametrize(
    ("dtypes", "casts"),
    [((mx.float16,) * 2, 0), ((mx.bfloat16,) * 2, 0), ((mx.float16, mx.bfloat16), 2)],
)
def test_scales_are_read_as_they_are_stored(dtypes: Any, casts: int) -> None:
    scales = [s.astype(dtype) for s, dtype in zip(PACKED[0][1:], dtypes, strict=True)]
    program = qg.compile(halved(scales), X, passes=[ChooseKernel(CPU), EliminateDeadCode()])
    left = [n for _, n in program.plan.graph.walk() if n.op == "astype"]
    assert len(left) == casts
    parts = [to_numpy(PACKED[0][0]), *(to_numpy(s.astype(mx.float32)) for s in scales)]
    dense = reference.dequantize(*parts, 64, 4, "affine").astype(np.float64)
    y = to_numpy(X).astype(np.float64)
    for _ in range(3):
        y = np.tanh(y) @ dense.T
    assert reference.relative_error(to_numpy(program(X)), y) < 1e-5


def test_other_kernels_have_casts_of_scales_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Choice("dequantize+matmul", "table", 1.0)
    monkeypatch.setattr("qgraph.passes.choose_kernel.choose", lambda *_, **__: chosen)
    scales = [s.astype(mx.float16) for s in PACKED[0][1:]]
    passes = [ChooseKernel(CPU), HoistQuantize()]
    plan = qg.optimize(qg.trace(halved(scales), X), passes=passes)
    assert [n.stage for _, n in plan.graph.walk() if n.op == "astype"] == ["pack"] * 2


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_casts_of_half_precision_belong_to_the_stretches(dtype: mx.Dtype) -> None:
    packed = [p if p.dtype == mx.uint32 else p.astype(dtype) for p in PACKED[0]]
    x = X.astype(dtype)
    passes = [ChooseKernel(CPU)]
    program = qg.compile(lambda x: qg.quantized_matmul(qg.tanh(x), *packed), x, passes=passes)
    ops = [(n.op, n.output.dtype) for n in program.plan.graph.nodes if n.op != "constant"]
    assert ops == [
        ("tanh", dtype),
        ("astype", mx.float32),
        ("packed_matmul", mx.float32),
        ("astype", dtype),
    ]
    parts = [
        to_numpy(p) if p.dtype == mx.uint32 else to_numpy(p.astype(mx.float32)) for p in packed
    ]
    dense = reference.dequantize(*parts, 64, 4, "affine").astype(np.float64)
    want = to_numpy(mx.tanh(x).astype(mx.float32)).astype(np.float64) @ dense.T
    limit = {mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    assert reference.relative_error(to_numpy(program(x).astype(mx.float32)), want) < limit


@pytest.mark.parametrize("loop", ["fori_loop", "scan", "while_loop"])
def test_carried_caches_are_written_in_place(loop: str) -> None:
    """Though a kernel of the host waits in the midst of a turn: nothing else holds them by then."""

    def turn(i: Any, y: Any, cache: Any) -> Any:
        cache = qg.slice_update(cache, y, i.reshape(1), axes=(0,))
        y = qg.tanh(qg.quantized_matmul(y + cache[:2], *PACKED[0]))
        return i + 2, y, cache

    def fn(y: Any, cache: Any) -> Any:
        start = (qg.zeros((), mx.int32), y, cache)
        if loop == "scan":
            return qg.scan(lambda c, _: (turn(*c), None), start, length=6)[0][1:]
        if loop == "fori_loop":
            return qg.fori_loop(0, 6, lambda _, c: turn(*c), start)[1:]
        return qg.while_loop(lambda c: c[0] < 12, lambda c: turn(*c), start)[1:]

    cache = mx.zeros((4096, N))
    program = qg.compile(fn, X, cache, passes=[ChooseKernel(CPU)], target="cpu")
    assert [n.kernel for _, n in program.plan.graph.walk() if n.kernel] == ["simd"]
    mx.eval(program(X, cache))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    y, after = program(X, cache)
    mx.eval(y, after)
    assert mx.get_peak_memory() - before < 1.5 * cache.nbytes

    want, held = to_numpy(X).astype(np.float64), np.zeros(cache.shape)
    for i in range(6):
        held[2 * i : 2 * i + 2] = want
        want = np.tanh((want + held[:2]) @ DENSE[0].T)
    assert reference.relative_error(to_numpy(y), want) < 1e-4
    assert reference.relative_error(to_numpy(after), held) < 1e-4


def test_a_loop_holds_a_few_of_what_it_carries() -> None:
    """Turns that are not waited for each copied their cache."""
    cache = mx.zeros((1 << 20,))
    mx.eval(cache)

    def turn(i: Any, carry: Any) -> Any:
        held, x = carry
        return qg.slice_update(held, x, i.reshape(1), axes=(0,)), qg.tanh(x) + 1

    fn = lambda n, c: qg.fori_loop(0, n, turn, (c, qg.ones((4,))))[0]  # noqa: E731
    program = qg.compile(fn, mx.array(1), cache, target="cpu")
    mx.eval(program(mx.array(2), cache))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = program(mx.array(100), cache)
    mx.eval(result)
    assert mx.get_peak_memory() - before < 4 * cache.nbytes
    assert result[102].item() > 1
