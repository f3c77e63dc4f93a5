"""Weights of GPTQ and AWQ against what their formats mean, in NumPy and float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from qgraph.errors import QuantizationError
from qgraph.quantization.repack import Repacked, from_awq, from_gptq, repacked
from tests.support.packed_files import COLUMNS, ROWS, Gptq, awq_words, bit_stream

Array = npt.NDArray[Any]


def _dense(packed: Repacked) -> Array:
    """The weight in float64, its columns where x has them."""
    parts = (np.array(a.astype(mx.float32), np.float64) for a in (packed.scales, packed.biases))
    scales, biases = (np.repeat(a, packed.group_size, axis=1) for a in parts)
    settings: Any = {"group_size": packed.group_size, "bits": packed.bits}
    shape = packed.scales.shape
    codes = mx.dequantize(packed.weight, mx.ones(shape), mx.zeros(shape), **settings)
    dense = scales * np.array(codes, np.float64) + biases
    if packed.order is None:
        return dense
    back = np.empty_like(dense)
    back[:, np.array(packed.order)] = dense
    return back


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
def test_gptq_is_what_its_file_says(bits: int, v2: bool) -> None:
    weight = Gptq(bits, v2=v2)
    packed = from_gptq(**weight.arrays, v2=v2)
    assert (packed.bits, packed.group_size, packed.order) == (bits, 64, None)
    np.testing.assert_array_equal(_dense(packed), weight.dense)
    without = from_gptq(weight.qweight, weight.scales, weight.qzeros, v2=v2)
    np.testing.assert_array_equal(_dense(without), weight.dense)


def test_what_the_other_reading_of_zeros_gives_is_seen() -> None:
    weight = Gptq(4)
    assert not np.array_equal(_dense(from_gptq(**weight.arrays, v2=True)), weight.dense)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_scattered_groups_reorder_the_columns(bits: int) -> None:
    weight = Gptq(bits, scattered=True)
    packed = from_gptq(**weight.arrays)
    assert packed.order is not None
    np.testing.assert_array_equal(_dense(packed), weight.dense)
    x = mx.random.normal((3, COLUMNS))
    settings: Any = {"group_size": packed.group_size, "bits": bits}
    y = mx.quantized_matmul(
        x[:, packed.order], packed.weight, packed.scales, packed.biases, **settings
    )
    np.testing.assert_allclose(np.array(y), np.array(x) @ weight.dense.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("group", "size"), [(COLUMNS, 128), (128, 128), (32, 32), (96, 32)])
def test_groups_that_mlx_has_no_size_for_are_cut(group: int, size: int) -> None:
    weight = Gptq(4, group)
    packed = from_gptq(**weight.arrays)
    assert packed.group_size == size
    np.testing.assert_array_equal(_dense(packed), weight.dense)


@pytest.mark.parametrize("stored", [7, 8])
def test_symmetric_zeros_are_half_however_they_are_stored(stored: int) -> None:
    weight = Gptq(4)
    zeros = bit_stream(np.full((COLUMNS // 64, ROWS), stored), 4)
    packed = from_gptq(weight.qweight, weight.scales, zeros, symmetric=True)
    bare = from_gptq(weight.qweight, weight.scales)
    np.testing.assert_array_equal(_dense(packed), _dense(bare))
    assert packed.scales.dtype == packed.biases.dtype == mx.float16  # eight times a scale fits
    np.testing.assert_array_equal(np.array(packed.biases), -8 * np.array(packed.scales))


def test_biases_that_float16_would_round_are_float32() -> None:
    assert from_gptq(**Gptq(4).arrays).biases.dtype == mx.float32


def test_awq_is_what_its_file_says() -> None:
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (COLUMNS, ROWS)), rng.integers(0, 16, (2, ROWS))
    scales = rng.uniform(0.01, 0.1, (2, ROWS)).astype(np.float16)
    packed = from_awq(awq_words(codes), mx.array(scales), awq_words(zeros))
    group = np.arange(COLUMNS) // 128
    dense = ((codes - zeros[group]) * scales.astype(np.float64)[group]).T
    np.testing.assert_array_equal(_dense(packed), dense)
    symmetric = from_awq(awq_words(codes), mx.array(scales))
    dense = ((codes - 8) * scales.astype(np.float64)[group]).T
    np.testing.assert_array_equal(_dense(symmetric), dense)


def test_a_checkpoint_keeps_what_is_not_packed() -> None:
    weight = Gptq(4)
    given = {f"a.{part}": array for part, array in weight.arrays.items()}
    given["a.bias"], given["norm.weight"] = mx.zeros(ROWS), mx.ones(8)
    found = repacked(given, {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4})
    assert sorted(found) == ["a", "a.bias", "norm.weight"]
    assert given == {}  # taken out one by one
    np.testing.assert_array_equal(_dense(found["a"]), weight.dense)


def _cut(name: str, to: Any) -> dict[str, mx.array]:
    return {**Gptq(4).arrays, name: to}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (_cut("g_idx", mx.full((COLUMNS,), 4, mx.int32)), "groups outside"),
        (_cut("g_idx", mx.full((COLUMNS,), -1, mx.int32)), "groups outside"),
        (_cut("g_idx", mx.zeros((8,), mx.int32)), "g_idx"),
        (_cut("qzeros", mx.zeros((4, 7), mx.int32)), "224 bits for 64 codes"),
        (_cut("qzeros", mx.zeros((3, 8), mx.int32)), "differ"),
        (_cut("scales", mx.zeros((4, 63))), "differ"),
        (_cut("scales", mx.zeros((4, 64), mx.int32)), "floats"),
        (_cut("qweight", mx.zeros((32, 64))), "32 bits"),
        (_cut("qweight", mx.zeros((0, 64), mx.int32)), "two axes"),
        (_cut("g_idx", mx.array(np.arange(COLUMNS) % 4, mx.int32)[:, None]), "g_idx"),
        (_cut("g_idx", mx.array(np.minimum(np.arange(COLUMNS) // 40, 3), mx.int32)), "divides"),
        (_cut("scales", None), "no scales"),
    ],
)
def test_damaged_weights_are_refused_by_name(arrays: dict[str, Any], words: str) -> None:
    given = {f"layers.0.up.{part}": a for part, a in arrays.items() if a is not None}
    with pytest.raises(QuantizationError, match=words) as error:
        repacked(given, {"quant_method": "gptq"})
    assert "layers.0.up" in str(error.value)


def test_other_layouts_are_refused() -> None:
    for config in ({"quant_method": "awq", "version": "GEMV"}, {"quant_method": "hqq"}, {}):
        with pytest.raises(QuantizationError, match="AWQ's gemm are read"):
            repacked({}, config)
    with pytest.raises(QuantizationError, match="belongs to no qweight"):
        repacked({"a.scales": mx.ones((2, 2))}, {"quant_method": "awq"})
