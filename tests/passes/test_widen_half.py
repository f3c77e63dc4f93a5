"""`widen-half`: half-precision products run in float32 on CPUs, and are more exact for it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.passes import EliminateDeadCode, HoistQuantize, WidenHalf
from qgraph.target import Target
from tests.support import reference
from tests.support.arrays import to_numpy

CPU = Target(mx.Device(mx.cpu, 0), "cpu", "x86_64", 2)
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
HALF = [mx.float16, mx.bfloat16]


def test_text_before_and_after_in_a_nested_loop() -> None:
    q, s, b = mx.quantize(mx.ones((64, 64), mx.float16))

    def fn(x: Any) -> Any:
        def inner(j: Any, h: Any) -> Any:
            return qg.quantized_matmul(h, q, s, b)

        return qg.fori_loop(0, 2, lambda i, h: qg.fori_loop(0, 2, inner, h), x)

    graph = qg.trace(fn, qg.spec((1, 64), mx.float16), name="f")
    plan = qg.optimize(graph, passes=[WidenHalf(CPU), HoistQuantize(), EliminateDeadCode()])
    assert plan.graph.format(origins=False) == (
        "graph f(x: f16[1,64]) -> f16[1,64]\n"
        "  pack (once):\n"
        "    s_astype: f32[64,1] = astype(@s) {dtype=f32}\n"
        "    b_astype: f32[64,1] = astype(@b) {dtype=f32}\n"
        "  %h: f16[1,64] = fori_loop[2](x; @q, s_astype, b_astype)\n"
        "    body(i: i32[], h: f16[1,64]; @q, s_astype, b_astype)\n"
        "      %h_2: f16[1,64] = fori_loop[2](h; @q, s_astype, b_astype)\n"
        "        body(j: i32[], h_2: f16[1,64]; @q, s_astype, b_astype)\n"
        "          %0: f32[1,64] = astype(h_2) {dtype=f32}\n"
        "          %1: f32[1,64] = quantized_matmul(%0, @q, s_astype, b_astype)"
        " {bits=4, group_size=64}\n"
        "          %2: f16[1,64] = astype(%1) {dtype=f16}\n"
        "          yield %2\n"
        "      yield %h_2\n"
        "  return %h"
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mode", MODES)
def test_the_error_is_no_more_than_that_of_dequantize_and_matmul(
    mode: str, dtype: mx.Dtype
) -> None:
    group_size, bits = MODES[mode]
    w = mx.random.normal((256, 2048), key=mx.random.key(0)).astype(dtype)
    x = mx.random.normal((4, 2048), key=mx.random.key(1)).astype(dtype)
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    parts = mx.quantize(w, **settings)
    arrays = [to_numpy(p) for p in parts]
    dense = reference.dequantize(
        arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None, group_size, bits, mode
    )
    expected = to_numpy(x).astype(np.float64) @ dense.T
    program = qg.compile(lambda x: qg.quantized_matmul(x, *parts, **settings), x, target="cpu")
    written = x @ mx.dequantize(*parts, **settings, dtype=dtype).T
    plain = mx.quantized_matmul(x, *parts, **settings, stream=mx.cpu)
    ours, theirs, kernel = (
        reference.relative_error(to_numpy(y), expected) for y in (program(x), written, plain)
    )
    assert program(x).dtype == dtype
    assert ours <= 1.1 * theirs
    assert ours < kernel


@pytest.mark.parametrize("dtype", HALF)
def test_experts(dtype: mx.Dtype) -> None:
    parts = mx.quantize(mx.random.normal((3, 64, 64), key=mx.random.key(0)).astype(dtype))
    ids = mx.array([2, 0], mx.uint32)

    def fn(x: Any) -> Any:
        return qg.gather_qmm(x, *parts, rhs_indices=ids)

    x = mx.ones((2, 1, 64), dtype)
    plan = qg.optimize(qg.trace(fn, x), passes=[WidenHalf(CPU)])
    (product,) = [n for n in plan.graph.nodes if n.op == "gather_qmm"]
    assert product.output.dtype == mx.float32
    assert plan.graph.outputs[0].dtype == dtype
    exact = fn(x.astype(mx.float32))
    assert mx.allclose(qg.compile(plan.graph, passes=[])(x), exact.astype(dtype), rtol=1e-2)


def test_leaves_alone() -> None:
    parts = mx.quantize(mx.ones((64, 64)))
    graph = qg.trace(lambda x: qg.quantized_matmul(x, *parts), qg.spec((1, 64)))
    assert WidenHalf(CPU)(graph) is graph
    half = qg.trace(lambda x: qg.quantized_matmul(x, *parts, mode="affine"),
                    qg.spec((1, 64), mx.float16))  # fmt: skip
    assert WidenHalf(Target(CPU.device, "cuda", "sm_90", 8))(half) is half
