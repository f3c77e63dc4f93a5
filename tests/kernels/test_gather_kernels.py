"""Kernels of `gather_qmm` against float64."""

import mlx.core as mx
import numpy as np
import pytest

from qgraph.kernels import EXACT, KERNELS, Problem, candidates, kernel
from qgraph.kernels.cpu.library import missing
from qgraph.kernels.streams import Streams
from tests.support.arrays import to_numpy

STREAMS = Streams(mx.Device(mx.cpu, 0))
MODES = [("affine", 4, 64), ("mxfp4", 4, 32), ("affine", 8, 32)]
TOLERANCE = {mx.float32: 3e-6, mx.float16: 5e-3, mx.bfloat16: 4e-2}


def operands(dtype, mode, batch=(7, 1), m=1, experts=5, n=64, k=128, transpose=True):
    name, bits, group = mode
    rng = np.random.default_rng(0)
    shape = (experts, n, k) if transpose else (experts, k, n)
    w = mx.array(rng.normal(size=shape)).astype(dtype)
    parts = mx.quantize(w, bits=bits, group_size=group, mode=name)
    x = mx.array(rng.normal(size=(*batch, m, k))).astype(dtype)
    scales = dtype if name == "affine" else mx.uint8
    return x, list(parts), Problem(
        14 * m, n, k, dtype, name, bits, group, transpose, scales, cores=2, experts=experts
    )  # fmt: skip


def exactly(x, parts, p, lhs, rhs):
    scales = [s.astype(mx.float32) if p.mode == "affine" else s for s in parts[1:]]
    w = mx.dequantize(parts[0], *scales, **p.settings, dtype=mx.float32)
    w = np.array(w, np.float64)
    x = to_numpy(x).astype(np.float64).reshape(-1, *x.shape[-2:])
    lhs, rhs = np.broadcast_arrays(lhs, rhs)
    return x[lhs] @ (w.swapaxes(-1, -2) if p.transpose else w)[rhs]


@pytest.mark.parametrize("mode", MODES, ids=lambda m: f"{m[0]}{m[1]}")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("m", [1, 3])
def test_every_candidate_is_the_product(dtype, mode, transpose, m):
    x, parts, p = operands(dtype, mode, m=m, transpose=transpose)
    rhs = np.random.default_rng(1).integers(0, 5, (7, 2)).astype(np.uint32)
    lhs = np.arange(7)[:, None]
    want = exactly(x, parts, p, lhs, rhs)
    plain = mx.gather_qmm(x, *parts, rhs_indices=mx.array(rhs), transpose=transpose, **p.settings)
    names = candidates(p)
    conditional = {"f32+gather_qmm", "group+simd"}
    tried = {cls.name for cls in KERNELS if cls.gathers and p.backend in cls.backends}
    assert set(names) >= tried - conditional
    assert ("group+simd" in names) == (transpose and missing() is None)
    for name in names:
        chosen = kernel(name)
        y = chosen.run(x, chosen.pack(parts, p), p, STREAMS, None, mx.array(rhs))
        assert (y.shape, y.dtype) == (plain.shape, plain.dtype), name
        assert np.linalg.norm(to_numpy(y) - want) < TOLERANCE[dtype] * np.linalg.norm(want), name
        if chosen.contract(p) == EXACT:
            assert mx.array_equal(y, plain).item(), name


def test_both_indices():
    x, parts, p = operands(mx.float32, MODES[0], batch=(7,))
    lhs, rhs = np.array([6, 0, 0, 3]), np.array([4, 4, 0, 1])
    want = exactly(x, parts, p, lhs, rhs)
    for name in candidates(p):
        chosen = kernel(name)
        y = chosen.run(
            x, chosen.pack(parts, p), p, STREAMS, mx.array(lhs, mx.uint32), mx.array(rhs, mx.uint32)
        )
        assert np.allclose(to_numpy(y), want, rtol=1e-4, atol=1e-4), name


def test_refusals():
    _, _, p = operands(mx.float32, MODES[0])
    assert "one matrix" in kernel("gather_qmm").applies(p.replace(experts=0))
    for name in ("group+simd", "group+host-blas"):
        assert "GPU" in kernel(name).applies(p.replace(backend="cuda"))
    assert candidates(p, exact=True) == ["gather_qmm", "sort+gather_qmm"]
