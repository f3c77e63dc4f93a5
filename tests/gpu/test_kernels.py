"""Kernels on a GPU against float64: skipped without one.

MLX compiles its product of eight rows and more for each format, half a minute and longer each, and
its own tests run it: QGRAPH_GPU_MLX=1 has it compared here too (`pytest -n 14`; what was compiled
stays in MLX_PTX_CACHE_DIR).
"""

import itertools
import os

import mlx.core as mx
import numpy as np
import pytest

from qgraph.kernels import EXACT, Problem, candidates, carry_out, kernel
from qgraph.kernels.choice.measuring import random_operands
from qgraph.kernels.streams import Streams
from qgraph.target import as_target

GPU = mx.Device(mx.gpu, 0)
pytestmark = pytest.mark.skipif(not mx.is_available(GPU), reason="needs a GPU")

MODES = [("affine", 4, 64), ("affine", 8, 64), ("affine", 4, 128), ("affine", 8, 32)]
MODES += [("affine", 2, 64), ("affine", 3, 64), ("affine", 6, 64)]
MODES += [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
COMPILED = 8
"""Rows from which MLX compiles its product of each format."""
WAITS = bool(os.environ.get("QGRAPH_GPU_MLX"))
TOLERANCE = {mx.float32: 1e-3, mx.float16: 5e-3, mx.bfloat16: 3e-2}
SIZES = [(256, 512), (1500, 4096), (4, 512), (2048, 2080), (128, 96)]


def make(m, n, k, dtype, mode, transpose=True):
    name, bits, group = mode
    target = as_target("gpu")
    scales = dtype if name == "affine" else mx.uint8
    return Problem(
        m, n, k, dtype, name, bits, group, transpose, scales, target.backend, target.arch, 1
    )


def exactly(p, x, parts):
    """In float64 by NumPy, of the weight as MLX's CPU decodes it into float32."""
    with mx.stream(mx.cpu):
        scales = [s.astype(mx.float32) for s in parts[1:]] if p.mode == "affine" else parts[1:]
        w = np.array(mx.dequantize(parts[0], *scales, **p.settings, dtype=mx.float32), np.float64)
        left = np.array(x.astype(mx.float32), np.float64)
    return left @ (w.T if p.transpose else w)


def check(p):
    with mx.stream(GPU):
        x, parts = random_operands(p, seed=p.m)
        want = exactly(p, x, parts)
        names = candidates(p, budget=1 << 40)
        if p.m >= COMPILED and not WAITS:
            names = [name for name in names if not name.endswith("qmm")]
        plain = mx.quantized_matmul(x, *parts, transpose=p.transpose, **p.settings)  # if asked for
        for name in names:
            chosen = kernel(name)
            packed = chosen.pack(parts, p)
            mx.eval(packed)
            y = carry_out(chosen, x, packed, p, Streams(GPU))
            got = np.array(y.astype(mx.float32), np.float64)
            assert y.dtype == p.out_dtype
            assert np.linalg.norm(got - want) < TOLERANCE[p.dtype] * np.linalg.norm(want), name
            if chosen.contract(p) == EXACT:
                assert mx.array_equal(y, plain).item(), name


@pytest.mark.parametrize("mode", MODES, ids=lambda m: f"{m[0]}{m[1]}g{m[2]}")
def test_candidates(mode):
    for m in (1, 3, 8, 13, 40):
        check(make(m, 256, 512, mx.bfloat16, mode))


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
def test_other_dtypes(dtype):
    for m in (1, 3, 8, 40):
        check(make(m, 256, 512, dtype, MODES[0]))


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_odd_sizes(n, k):
    for m in (1, 5, 12, 100):
        check(make(m, n, k, mx.bfloat16, ("affine", 4, 32)))


@pytest.mark.parametrize("mode", [MODES[0], MODES[7]], ids=lambda m: f"{m[0]}{m[1]}g{m[2]}")
def test_not_transposed(mode):
    for m in (1, 4, 64):
        check(make(m, 512, 256, mx.bfloat16, mode, transpose=False))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_tensor_cores(dtype, bits, group):
    """Rows and columns that fill no tile, K that fills no chunk, x at any address."""
    for (n, k), m in itertools.product([(200, 512), (4096, 1536), (9, 256)], [1, 3, 8, 13, 32]):
        p = make(m, n, k, dtype, ("affine", bits, group))
        x, parts = random_operands(p, seed=m)
        y = carry_out(kernel("mma"), x, parts, p, Streams(GPU))
        got, want = np.array(y.astype(mx.float32), np.float64), exactly(p, x, parts)
        assert np.linalg.norm(got - want) < 3e-3 * np.linalg.norm(want), p
        shifted = mx.concatenate([mx.zeros((1,), dtype), x.reshape(-1)])
        mx.eval(shifted)
        again = carry_out(kernel("mma"), shifted[1:].reshape(m, k), parts, p, Streams(GPU))
        assert mx.array_equal(y, again).item()


@pytest.mark.parametrize("rows", [4, 64])
def test_gathered_products(rows):
    p = make(rows, 256, 512, mx.bfloat16, MODES[0]).replace(experts=5)
    with mx.stream(GPU):
        x, parts = random_operands(p)
    rhs = np.random.default_rng(1).integers(0, 5, rows)
    with mx.stream(mx.cpu):
        scales = [s.astype(mx.float32) for s in parts[1:]]
        w = np.array(mx.dequantize(parts[0], *scales, **p.settings), np.float64)
        left = np.array(x.astype(mx.float32), np.float64)
    want = left[:, None] @ w.swapaxes(-1, -2)[rhs]
    for name in candidates(p):
        chosen = kernel(name)
        packed = chosen.pack(parts, p)  # as the kernel reads it, which may be in tiles
        y = chosen.run(x[:, None], packed, p, Streams(GPU), None, mx.array(rhs, mx.uint32))
        got = np.array(y.astype(mx.float32), np.float64)
        assert np.linalg.norm(got - want) < 3e-2 * np.linalg.norm(want), name
