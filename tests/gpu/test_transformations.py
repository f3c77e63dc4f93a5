"""Gradients through programs on a GPU: kernels written for CUDA give way to MLX's own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from tests.support import reference
from tests.support.arrays import to_numpy

from .test_kernels import WAITS

GPU = mx.Device(mx.gpu, 0)
pytestmark = pytest.mark.skipif(not mx.is_available(GPU), reason="needs a GPU")


def gradient(fn: Any, x: mx.array) -> Any:
    return to_numpy(mx.grad(lambda x: fn(x).astype(mx.float32).sum())(x))


@pytest.mark.parametrize("rows", [1, 4, *([16] if WAITS else [])])  # MLX compiles those of 16
def test_products(rows: int) -> None:
    w = mx.random.normal((4096, 4096), key=mx.random.key(0)).astype(mx.bfloat16) / 64
    x = mx.random.normal((rows, 4096), key=mx.random.key(1)).astype(mx.bfloat16)
    packed = mx.quantize(w)
    fn = lambda x: qg.tanh(qg.quantized_matmul(x, *packed))  # noqa: E731
    program = qg.compile(fn, x, target="gpu")
    print(rows, {n.kernel for n in program.plan.graph.nodes if n.kernel})
    assert reference.relative_error(gradient(program, x), gradient(fn, x)) < 3e-2
    assert reference.relative_error(to_numpy(mx.compile(program)(x)), to_numpy(fn(x))) < 3e-2


def test_attention() -> None:
    q = mx.random.normal((1, 8, 1, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    k = mx.random.normal((1, 2, 1024, 128), key=mx.random.key(2)).astype(mx.bfloat16)

    def fn(q: Any, last: Any) -> Any:
        mask = qg.arange(1024) <= last
        return qg.fast.scaled_dot_product_attention(q, k, k, scale=0.1, mask=mask)

    last = mx.array(700)
    program = qg.compile(fn, q, last, target="gpu")
    assert "decode_attention" in {n.op for n in program.plan.graph.nodes}
    mine, theirs = (gradient(lambda q, f=f: f(q, last), q) for f in (program, fn))
    assert reference.relative_error(mine, theirs) < 3e-2
