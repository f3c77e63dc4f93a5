"""Products on a weight laid out in tiles, on a GPU against float64: skipped without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qgraph.kernels import Problem, carry_out, kernel
from qgraph.kernels.choice.measuring import random_operands
from qgraph.kernels.cuda.kernel import compiled_together
from qgraph.kernels.streams import Streams

from .test_kernels import COMPILED, GPU, WAITS, exactly, make

pytestmark = pytest.mark.skipif(not mx.is_available(GPU), reason="needs a GPU")

FORMATS = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMATS += [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
ROUNDED = {mx.bfloat16: 3e-3, mx.float16: 6e-4}
"""Of the weight and of the result, each within half a unit of the last place."""
AS_MLX = 1.01
"""Errors of MLX and ours are sums of roundings of the same size."""
by_format = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f[0]}{f[1]}g{f[2]}")
by_dtype = pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
by_size = pytest.mark.parametrize(("m", "n", "k"), [(COMPILED - 1, 192, 640), (40, 130, 1152)])
"""Rows of MLX's kernel for few and for many; the rows of neither weight fill tiles of 128."""


def product(p: Problem, x: mx.array, parts: Sequence[mx.array]) -> mx.array:
    packed = kernel("tiled").pack(parts, p)
    return carry_out(kernel("tiled"), x, packed, p, Streams(GPU))


def by_mlx(p: Problem, x: mx.array, parts: Sequence[mx.array]) -> mx.array:
    """MLX's product of the rows of the weight that fill its tiles: by the kernel of models."""
    whole = p.n // 128 * 128
    return mx.quantized_matmul(x, *(part[:whole] for part in parts), transpose=True, **p.settings)


def error(y: mx.array, want: Any) -> float:
    got = np.array(y.astype(mx.float32), np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@by_size
@by_dtype
@by_format
def test_formats(form: tuple[str, int, int], dtype: mx.Dtype, m: int, n: int, k: int) -> None:
    """Within rounding, and no farther from float64 than MLX."""
    p = make(m, n, k, dtype, form)
    x, parts = random_operands(p, seed=m)
    want = exactly(p, x, parts)
    with compiled_together():
        y = product(p, x, parts)
    assert error(y, want) < ROUNDED[dtype]
    if m < COMPILED or WAITS:
        plain = by_mlx(p, x, parts)
        there = plain.shape[1]
        theirs = error(plain, want[:, :there])
        assert error(y[:, :there], want[:, :there]) < AS_MLX * theirs


@by_size
@by_dtype
@by_format
def test_what_is_not_finite(
    form: tuple[str, int, int], dtype: mx.Dtype, m: int, n: int, k: int
) -> None:
    """NaN and infinities reach what MLX lets them reach, and no other row."""
    p = make(m, n, k, dtype, form)
    x, parts = random_operands(p)
    x[3, 7], x[5, 9], x[6, 1] = mx.nan, mx.inf, -mx.inf
    with compiled_together():
        y = product(p, x, parts)
    rows = mx.any(~mx.isfinite(y), axis=1).tolist()
    assert [row for row, found in enumerate(rows) if found] == [3, 5, 6]
    if m < COMPILED or WAITS:
        plain = by_mlx(p, x, parts)
        for of in (mx.isnan, mx.isposinf, mx.isneginf):
            assert mx.array_equal(of(y[:, : plain.shape[1]]), of(plain)).item()


@pytest.mark.parametrize("m", [1, 8, 9, 31, 64, 65, 150, 200, 300])
def test_rows_and_columns_that_divide_nothing(m: int) -> None:
    sizes = [(64, 64, 32), (5, 96, 32), (500, 96, 32), (333, 4096, 128)]
    asked = [make(m, n, k, mx.bfloat16, ("affine", 4, group)) for n, k, group in sizes]
    operands = [random_operands(p, seed=m) for p in asked]
    with compiled_together():
        results = [product(p, *given) for p, given in zip(asked, operands, strict=True)]
    for p, (x, parts), y in zip(asked, operands, results, strict=True):
        assert error(y, exactly(p, x, parts)) < ROUNDED[mx.bfloat16], p
        shifted = mx.concatenate([mx.zeros((1,), p.dtype), x.reshape(-1)])
        mx.eval(shifted)
        assert mx.array_equal(y, product(p, shifted[1:].reshape(m, p.k), parts)).item()


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize(("experts", "rows"), [(5, 4), (5, 64), (40, 300), (3, 600)])
def test_experts(experts: int, rows: int, each: int) -> None:
    p = make(rows * each, 200, 512, mx.bfloat16, ("affine", 4, 64)).replace(experts=experts)
    x, parts = random_operands(p)
    rhs = np.random.default_rng(1).integers(0, experts, rows)
    lhs = np.random.default_rng(2).integers(0, rows, rows)
    left = x.reshape(rows, each, p.k)
    with mx.stream(mx.cpu):
        scales = [s.astype(mx.float32) for s in parts[1:]]
        w = np.array(mx.dequantize(parts[0], *scales, **p.settings), np.float64)
        dense = np.array(left.astype(mx.float32), np.float64)
    chosen = kernel("group+tiled")
    packed = chosen.pack(parts, p)
    indices = [mx.array(i, mx.uint32) for i in (lhs, rhs)]
    with compiled_together():
        y = chosen.run(left, packed, p, Streams(GPU), *indices)
    want = dense[lhs] @ w.swapaxes(-1, -2)[rhs]
    assert y.shape == want.shape
    assert error(y, want) < ROUNDED[mx.bfloat16]


def test_experts_of_one_token() -> None:
    """A row by eight experts, of which it is the only one."""
    p = make(8, 200, 512, mx.bfloat16, ("affine", 4, 64)).replace(experts=40)
    x, parts = random_operands(p)
    rhs = np.random.default_rng(1).permutation(40)[:8]
    with mx.stream(mx.cpu):
        scales = [s.astype(mx.float32) for s in parts[1:]]
        w = np.array(mx.dequantize(parts[0], *scales, **p.settings), np.float64)
        dense = np.array(x[:1].astype(mx.float32), np.float64)
    chosen = kernel("group+tiled")
    packed = chosen.pack(parts, p)
    rows, experts = mx.zeros((1, 8), mx.uint32), mx.array(rhs[None], mx.uint32)
    with compiled_together():
        y = chosen.run(x[:1, None][None], packed, p, Streams(GPU), rows, experts)
    want = dense @ w.swapaxes(-1, -2)[rhs]
    assert y.shape == (1, 8, 1, p.n)
    assert error(y[0], want) < ROUNDED[mx.bfloat16]


@by_format
def test_rows_are_taken_as_they_were(form: tuple[str, int, int]) -> None:
    p = make(1, 300, 4096, mx.bfloat16, form)
    _, parts = random_operands(p)
    ids = mx.array([[0, 299, -1], [64, 63, 7]])
    with compiled_together():
        rows = kernel("tiled").take_rows(kernel("tiled").pack(parts, p), ids, p)
    for got, want in zip(rows, parts, strict=True):
        assert mx.array_equal(got, want[ids]).item()
