"""`round-activations`: rows are rounded to 8 bits before products, where the user asks for it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.errors import InputError, QuantizationError
from qgraph.passes import RoundActivations
from tests.support import reference
from tests.support.arrays import to_numpy

ROUND = qg.Quantize(where={}, activations=8)


def packed(n: int, k: int, **settings: Any) -> Any:
    return mx.quantize(mx.random.normal((n, k), key=mx.random.key(n)), **settings)


def dense(parts: Any, bits: int, group_size: int) -> Any:
    return reference.dequantize(*map(np.array, parts), bits=bits, group_size=group_size)


def test_text_in_a_nested_loop_where_products_share_what_is_rounded() -> None:
    q = packed(64, 64)

    def fn(x: Any) -> Any:
        def step(i: Any, h: Any) -> Any:
            return qg.quantized_matmul(h, *q) + qg.tanh(qg.quantized_matmul(h, *q))

        return qg.fori_loop(0, 2, lambda i, h: qg.fori_loop(0, 2, step, h), x)

    plan = qg.optimize(qg.trace(fn, qg.spec((8, 64)), name="f"), passes=[RoundActivations()])
    assert plan.graph.format(origins=False) == (
        "graph f(x: f32[8,64]) -> f32[8,64]\n"
        "  %h: f32[8,64] = fori_loop[2](x; @q.0, @q.1, @q.2)\n"
        "    body(i: i32[], h: f32[8,64]; @q.0, @q.1, @q.2)\n"
        "      %h_2: f32[8,64] = fori_loop[2](h; @q.0, @q.1, @q.2)\n"
        "        body(i_2: i32[], h_2: f32[8,64]; @q.0, @q.1, @q.2)\n"
        "          %0: u32[8,16], %1: f32[8,2], %2: f32[8,2] = quantize(h_2)"
        " {bits=8, group_size=32}\n"
        "          %3: f32[8,64] = dequantize(%0, %1, %2) {bits=8, group_size=32}\n"
        "          %4: f32[8,64] = quantized_matmul(%3, @q.0, @q.1, @q.2)"
        " {bits=4, group_size=64}\n"
        "          %5: f32[8,64] = quantized_matmul(%3, @q.0, @q.1, @q.2)"
        " {bits=4, group_size=64}\n"
        "          %6: f32[8,64] = tanh(%5)\n"
        "          %7: f32[8,64] = add(%4, %6)\n"
        "          yield %7\n"
        "      yield %h_2\n"
        "  return %h"
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64), (4, 128)])
def test_numbers(bits: int, group: int, dtype: mx.Dtype) -> None:
    """What the program computes is the product of the rounded rows, in float64."""
    parts = packed(96, 256, bits=bits, group_size=group)
    given = [p if p.dtype == mx.uint32 else p.astype(dtype) for p in parts]
    x = mx.random.normal((2, 10, 256), dtype, key=mx.random.key(1))
    program = qg.compile(
        lambda x: qg.silu(qg.quantized_matmul(x, *given, group_size=group, bits=bits)),
        x, target="cpu", quantize=ROUND,
    )  # fmt: skip
    rows = mx.quantize(x.astype(mx.float32), 32, 8)
    wide = [given[0], *(p.astype(mx.float32) for p in given[1:])]
    sums = np.asarray(dense(rows, 8, 32), np.float64) @ dense(wide, bits, group).T
    y = program(x)
    assert y.dtype == dtype
    limit = 5e-6 if dtype == mx.float32 else 8e-3
    assert reference.relative_error(to_numpy(y), sums / (1 + np.exp(-sums))) < limit
    assert program.plan.check(x) is None


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        (7, {}, "7 rows"),
        (8, {"bits": 5, "group_size": 32}, "not affine of 4 or 8 bits"),
        (8, {"bits": 4, "mode": "mxfp4", "group_size": 32}, "not affine of 4 or 8 bits"),
    ],
)
def test_what_it_leaves_alone(rows: int, settings: Any, reason: str) -> None:
    parts = packed(64, 64, **settings)
    graph = qg.trace(
        lambda x: qg.quantized_matmul(x, *parts, **settings), qg.spec((rows, 64)), name="f"
    )
    plan = qg.optimize(graph, target="cpu", quantize=ROUND)
    step = next(s for s in plan.steps if s.name == "round-activations")
    assert not step.changed
    assert reason in step.entries[0].reason


def test_codes_that_something_else_reads_too() -> None:
    """Then the rounding is done for itself, as MLX does it."""
    x = mx.random.normal((16, 96), key=mx.random.key(2))
    x[3] = 0
    rounded = qg.compile(lambda x: qg.quantize(x, 32, 8), x, target="cpu")
    for ours, theirs in zip(rounded(x), mx.quantize(x, 32, 8), strict=True):
        assert mx.array_equal(ours, theirs)


def test_it_is_asked_for_with_a_number_and_with_the_default_passes() -> None:
    with pytest.raises(QuantizationError, match="activations=4"):
        qg.Quantize(activations=4)
    with pytest.raises(InputError, match="belongs to the default passes"):
        qg.optimize(qg.trace(qg.tanh, qg.spec(4)), quantize=ROUND, passes=[])
