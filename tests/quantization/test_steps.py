"""Quantized weights are within a step of their group, and what is further is found."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.quantization.steps import error_in_steps, round_trip, steps
from tests.support import reference
from tests.support.arrays import to_numpy
from tests.support.fusion import FORMATS

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=20, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
    offset=st.sampled_from([0.0, 0.5, 5.0]),
)
def test_every_format(form: str, dtype: mx.Dtype, seed: int, size: float, offset: float) -> None:
    w = size * (offset + mx.random.normal((4, 128), key=mx.random.key(seed)))
    _, error = round_trip(w.astype(dtype), **FORMATS[form])
    assert error <= 1


@pytest.mark.parametrize("form", FORMATS)
def test_a_wrong_weight(form: str) -> None:
    w = mx.random.normal((4, 128), key=mx.random.key(0))
    group, bits, mode = FORMATS[form].values()
    rounded, error = round_trip(w, group, bits, mode)
    assert 0 < error <= 1
    scales = mx.quantize(w, group, bits, mode=mode)[1]
    away = 1.01 * mx.repeat(steps(scales, bits, mode), group, axis=1)
    assert error_in_steps(w, w + away, scales, bits, mode) > 1
    assert error_in_steps(w, rounded, scales, bits, mode) == error


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_scales_are_those_of_the_formats(mode: str) -> None:
    codes = mx.arange(1, 127).astype(mx.uint8)
    decode = reference.decode_e4m3 if mode == "nvfp4" else reference.decode_e8m0
    widest = {"mxfp4": 2, "mxfp8": 32, "nvfp4": 2}[mode]
    more = 3 * 2.0**-9 if mode == "nvfp4" else 0
    found = to_numpy(steps(codes, 0, mode))
    np.testing.assert_allclose(found, widest * decode(np.arange(1, 127)) + more, rtol=1e-6)
