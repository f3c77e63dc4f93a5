"""A residual and its norm in one launch on a GPU, against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.ir.loops import REGION
from tests.support.arrays import to_numpy
from tests.support.reference import relative_error

GPU = mx.Device(mx.gpu, 0)
pytestmark = pytest.mark.skipif(
    not mx.is_available(GPU) or not mx.cuda.is_available(), reason="needs a CUDA GPU"
)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(mx.bfloat16, 4e-3), (mx.float16, 5e-4), (mx.float32, 1e-6)], ids=str
)
@pytest.mark.parametrize(("rows", "width"), [(16, 4096), (1, 64), (300, 1536), (40, 5120)])
def test_numbers(dtype: mx.Dtype, limit: float, rows: int, width: int) -> None:
    mx.random.seed(6)
    x, h = (mx.random.normal((rows, width)).astype(dtype) for _ in range(2))
    weight = mx.random.uniform(0.5, 1.5, (width,)).astype(dtype)

    def fn(x: Any, h: Any, weight: Any) -> Any:
        return (s := h + x), qg.fast.rms_norm(s, weight, 1e-5)

    program = qg.compile(fn, x, h, weight, target="gpu")
    assert any(node.op == REGION for node in program.plan.graph.nodes)
    sum = to_numpy(h + x)
    norm = sum / np.sqrt((sum * sum).mean(-1, keepdims=True) + 1e-5) * to_numpy(weight)
    given = x, h, weight
    for made, wanted in zip(program(*given), (sum, norm), strict=True):
        assert relative_error(to_numpy(made), wanted) < limit
    offset = mx.concatenate([mx.zeros((3,), dtype), x.flatten()])[3:].reshape(rows, width)
    for made, wanted in zip(program(offset, h, weight), (sum, norm), strict=True):
        assert relative_error(to_numpy(made), wanted) < limit
