"""Kernels on a GPU against float64: skipped without one."""

import mlx.core as mx
import numpy as np
import pytest

from qgraph.interpret import Streams
from qgraph.kernels import EXACT, Problem, candidates, carry_out, kernel
from qgraph.target import as_target
from qgraph.tuner import random_operands

GPU = mx.Device(mx.gpu, 0)
pytestmark = pytest.mark.skipif(not mx.is_available(GPU), reason="needs a GPU")

MODES = [("affine", 4, 64), ("affine", 8, 64), ("affine", 4, 128), ("affine", 8, 32)]
MODES += [("affine", 2, 64), ("affine", 3, 64), ("affine", 6, 64)]
MODES += [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
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
        plain = mx.quantized_matmul(x, *parts, transpose=p.transpose, **p.settings)
        for name in candidates(p, budget=1 << 40):
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
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("m", [1, 3, 8, 13, 40])
def test_candidates(m, mode, dtype):
    check(make(m, 256, 512, dtype, mode))


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("m", [1, 5, 12, 100])
def test_odd_sizes(m, n, k):
    check(make(m, n, k, mx.bfloat16, ("affine", 4, 32)))


@pytest.mark.parametrize("mode", MODES, ids=lambda m: f"{m[0]}{m[1]}g{m[2]}")
@pytest.mark.parametrize("m", [1, 4, 64])
def test_not_transposed(m, mode):
    check(make(m, 512, 256, mx.bfloat16, mode, transpose=False))
