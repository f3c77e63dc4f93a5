"""The NumPy reference against values worked out by hand from the formats, then MLX against it.

MLX runs on its CPU device here: GPU kernels round float elements otherwise, and may use TF32.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import reference as ref
from tests.support.arrays import to_numpy

AFFINE = [("affine", group, bits) for group in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)]
FLOAT = [(mode, group, bits) for mode, (group, bits) in ref.FLOAT_MODES.items()]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# One rounding of each dtype; a matmul accumulates many, in MLX's kernels in the dtype itself.
EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
MATMUL_ERROR = {"float32": 2e-6, "float16": 5e-3, "bfloat16": 4e-2}

each_format = pytest.mark.parametrize(("mode", "group_size", "bits"), AFFINE + FLOAT)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def weights(kind: str, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """64 rows of 256, within what float16 holds."""
    w = np.random.default_rng(seed).standard_normal((64, 256))
    if kind == "negative":
        w = -np.abs(w) - 0.1
    elif kind == "constant":
        w = np.broadcast_to(np.linspace(-3, 3, 64)[:, None], w.shape)
    elif kind == "zeros":
        w = w * (np.arange(256) >= 128)
    elif kind == "powers":
        w = np.broadcast_to(np.exp2(np.arange(64) % 40 - 24.0)[:, None], w.shape)
    elif kind == "wide":
        w = w * np.exp2(np.random.default_rng(seed + 1).uniform(-8, 8, (64, 1)))
    return w.astype(np.float32)


def packed(w: mx.array, mode: str, group_size: int, bits: int) -> tuple[Any, Any, Any]:
    """Codes, scales and biases (None where the mode has none), by MLX on the CPU."""
    q = mx.quantize(w, group_size=group_size, bits=bits, mode=mode, stream=mx.cpu)
    return q[0], q[1], q[2] if mode == "affine" else None


def operands(q: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    w_q, scales, biases = q
    return to_numpy(w_q), to_numpy(scales), None if biases is None else to_numpy(biases)


# --- by hand, from the specifications -------------------------------------------------------


def test_e2m1_is_the_table_of_the_specification() -> None:
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = ref.decode_e2m1(np.arange(16))
    assert values.tolist() == positive + [-v for v in positive]
    assert np.signbit(values[8])


def test_e4m3_landmarks() -> None:
    landmarks = {
        0x00: 0.0,
        0x01: 2.0**-9,  # smallest subnormal
        0x07: 0.875 * 2.0**-6,  # largest subnormal
        0x08: 2.0**-6,  # smallest normal
        0x38: 1.0,
        0x3C: 1.5,
        0x7E: 448.0,  # largest
        0xB8: -1.0,
        0xFE: -448.0,
    }
    codes = np.array(list(landmarks))
    assert ref.decode_e4m3(codes).tolist() == list(landmarks.values())
    assert np.isnan(ref.decode_e4m3(np.array([0x7F, 0xFF]))).all()


def test_e8m0_landmarks() -> None:
    values = ref.decode_e8m0(np.array([0, 126, 127, 128, 254]))
    assert values.tolist() == [2.0**-127, 0.5, 1.0, 2.0, 2.0**127]
    assert np.isnan(ref.decode_e8m0(np.array([255])))[0]


def test_elements_round_to_nearest_ties_to_even_and_saturate() -> None:
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.1])
    codes = ref.encode_nearest(ties, ref.E2M1_MAGNITUDES)
    assert ref.decode_e2m1(codes).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0]
    assert codes[-1] == 8  # a negative zero
    eights = ref.encode_nearest(np.array([17.0, 19.0, -17.0, 1e9, 2.0**-10]), ref.E4M3_MAGNITUDES)
    assert ref.decode_e4m3(eights).tolist() == [16, 20, -16, 448, 0]


def test_codes_are_a_little_endian_stream_of_bits() -> None:
    # 2 bits: codes 0, 1, 2, 3 are 11 10 01 00 = 0xE4.
    assert ref.pack(np.arange(16) % 4, 2).tolist() == [0xE4E4E4E4]
    # 3 bits: codes 0..7 are the 24 bits 111 110 101 100 011 010 001 000 = 0xFAC688, and again.
    assert ref.pack(np.arange(32) % 8, 3).tolist() == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    # 6 bits: codes 1, 2, 3, 4 are 000100 000011 000010 000001 = 0x103081.
    assert ref.pack(np.array([1, 2, 3, 4] * 4), 6).tolist() == [0x81103081, 0x30811030, 0x10308110]


def test_mx_scale_by_the_specification_and_by_mlx() -> None:
    w = np.zeros((1, 32))
    w[0, :3] = [7.0, 5.0, 1.0]
    spec = ref.quantize(w, 32, 4, "mxfp4", rule="spec")  # floor(log2 7) - 2 = 0: 7 saturates
    assert spec.scales.tolist() == [[127]]
    assert ref.dequantize(spec.w_q, spec.scales, None, 32, 4, "mxfp4")[0, :3].tolist() == [6, 4, 1]
    mlx = ref.quantize(w, 32, 4, "mxfp4")  # ceil(log2(7 / 6)) = 1: 3.5 ties down to 3
    assert mlx.scales.tolist() == [[128]]
    assert ref.dequantize(mlx.w_q, mlx.scales, None, 32, 4, "mxfp4")[0, :3].tolist() == [6, 4, 1]
    eight = ref.quantize(w * 64, 32, 8, "mxfp8", rule="spec")  # floor(log2 448) - 8 = 0
    assert eight.scales.tolist() == [[127]]
    dense = ref.dequantize(eight.w_q, eight.scales, None, 32, 8, "mxfp8")
    assert dense[0, :3].tolist() == [448, 320, 64]


def test_nvfp4_scale_is_amax_over_six_in_e4m3() -> None:
    w = np.zeros((1, 16))
    w[0, :3] = [6.0, -3.0, 0.5]
    q = ref.quantize(w, 16, 4, "nvfp4")
    assert q.scales.tolist() == [[0x38]]
    assert np.array_equal(ref.dequantize(q.w_q, q.scales, None, 16, 4, "nvfp4"), w)


def test_affine_counts_from_the_edge_of_larger_magnitude() -> None:
    w = np.zeros((1, 32))
    w[0, :4] = [15.0, 7.0, 1.0, 0.0]
    q = ref.quantize(w, 32, 4)
    assert q.biases is not None
    assert (q.scales.item(), q.biases.item()) == (-1.0, 15.0)
    assert ref.unpack(q.w_q, 4)[0, :4].tolist() == [0, 8, 14, 15]
    assert np.array_equal(ref.dequantize(q.w_q, q.scales, q.biases, 32), w)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_unpack_inverts_pack(seed: int, bits: int, words: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, 32 * words))
    w_q = ref.pack(codes, bits)
    assert w_q.shape == (3, bits * words)
    assert np.array_equal(ref.unpack(w_q, bits), codes)


@pytest.mark.parametrize(("mode", "group_size", "bits"), FLOAT)
def test_a_weight_on_the_grid_is_kept(mode: str, group_size: int, bits: int) -> None:
    """Not so for affine, where the edge moves: a second quantization changes the weight."""
    form = (group_size, bits, mode)
    w = ref.dequantize(*ref.quantize(weights("plain"), *form), *form)
    assert np.array_equal(ref.dequantize(*ref.quantize(w, *form), *form), w)


@each_format
@pytest.mark.parametrize("rule", ["mlx", "spec"])
def test_every_element_is_near_its_weight(rule: str, mode: str, group_size: int, bits: int) -> None:
    w = weights("plain").reshape(64, -1, group_size)
    q = ref.quantize(w.reshape(64, 256), group_size, bits, mode, rule=rule)
    error = np.abs(ref.dequantize(*q, group_size, bits, mode).reshape(w.shape) - w)
    if mode == "affine":
        # half a step, and as much again at the far edge, cut off where the scale was stretched
        bound = np.abs(q.scales)
    elif mode == "nvfp4":
        # half the widest gap, 4 to 6; or the edge cut off by a scale rounded to 4 digits
        bound = np.maximum(ref.decode_e4m3(q.scales), np.abs(w).max(axis=-1) / 16)
    else:
        # half the widest gap, 4 to 6 or 416 to 448; by the specification 6 to 8, 448 to 512 cut off
        half_gap, cut = (16, 64) if mode == "mxfp8" else (1, 2)
        bound = ref.decode_e8m0(q.scales) * (cut if rule == "spec" else half_gap)
    assert (error <= bound[..., None] * (1 + 1e-9)).all()


# --- MLX against the reference --------------------------------------------------------------


@each_dtype
@each_format
@pytest.mark.parametrize("kind", ["plain", "negative", "constant", "zeros", "wide", "powers"])
def test_quantize_is_mlx_bit_for_bit(
    kind: str, mode: str, group_size: int, bits: int, dtype: str
) -> None:
    w = mx.array(weights(kind)).astype(DTYPES[dtype])
    theirs = operands(packed(w, mode, group_size, bits))
    ours = ref.quantize(to_numpy(w), group_size, bits, mode, dtype=dtype)
    for mine, their in zip(ours, theirs, strict=True):
        if their is None:
            assert mine is None
        else:
            assert mine is not None
            assert np.array_equal(mine, their)


@given(st.integers(0, 2**32 - 1), st.sampled_from(AFFINE + FLOAT), st.integers(-60, 60))
@settings(max_examples=60, deadline=None)
def test_exact_arithmetic_differs_only_at_ties(
    seed: int, form: tuple[str, int, int], power: int
) -> None:
    """Float64 and float32 part where a quotient is within a rounding of a half: rare, by one."""
    mode, group_size, bits = form
    if mode == "nvfp4" or mode == "affine":
        power = max(-8, min(power, 8))  # range of the E4M3 scale, and of affine's least scale
    w = weights("plain", seed) * np.float32(2.0**power)
    single = ref.quantize(w, group_size, bits, mode, dtype="float32")
    double = ref.quantize(w, group_size, bits, mode)
    # a scale that is itself a rounded logarithm or quotient may fall on the other side too
    alike = np.isclose(single.scales.astype(float), double.scales.astype(float), rtol=1e-5)
    assert (~alike).mean() < 0.01
    codes = [ref.unpack(q.w_q, bits).astype(int) for q in (single, double)]
    apart = np.abs(codes[0] - codes[1]).reshape(64, -1, group_size)[alike]
    assert (apart != 0).mean() < 1e-3
    assert apart.max() <= 1


@each_dtype
@each_format
def test_dequantize(mode: str, group_size: int, bits: int, dtype: str) -> None:
    w = mx.array(weights("wide")).astype(DTYPES[dtype])
    q = packed(w, mode, group_size, bits)
    dense = mx.dequantize(
        *q, group_size=group_size, bits=bits, mode=mode, dtype=DTYPES[dtype], stream=mx.cpu
    )
    expected = ref.dequantize(*operands(q), group_size, bits, mode)
    # code * scale and the sum are each rounded once, at the size of the group's largest terms
    size = 2 * np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(to_numpy(dense) - expected) <= 2 * EPSILON[dtype] * size).all()


@each_dtype
@each_format
@pytest.mark.parametrize("transpose", [True, False])
def test_quantized_matmul(
    mode: str, group_size: int, bits: int, dtype: str, transpose: bool
) -> None:
    q = packed(mx.array(weights("plain")).astype(DTYPES[dtype]), mode, group_size, bits)
    x = np.random.default_rng(1).standard_normal((2, 3, 256 if transpose else 64))
    x_mx = mx.array(x.astype(np.float32)).astype(DTYPES[dtype])
    out = mx.quantized_matmul(
        x_mx, *q, transpose=transpose, group_size=group_size, bits=bits, mode=mode, stream=mx.cpu
    )
    expected = ref.quantized_matmul(to_numpy(x_mx), *operands(q), transpose, group_size, bits, mode)
    assert out.shape == expected.shape
    assert ref.relative_error(to_numpy(out), expected) < MATMUL_ERROR[dtype]


@each_dtype
@pytest.mark.parametrize(("mode", "group_size", "bits"), [("affine", 64, 4), *FLOAT])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_gather_qmm(
    mode: str, group_size: int, bits: int, dtype: str, transpose: bool, sides: str
) -> None:
    w = weights("plain").reshape(4, 16, 256)
    q = packed(mx.array(w).astype(DTYPES[dtype]), mode, group_size, bits)
    x = np.random.default_rng(1).standard_normal((2, 2, 3, 256 if transpose else 16))
    x_mx = mx.array(x.astype(np.float32)).astype(DTYPES[dtype])
    if sides != "both":  # without indices MLX asks for the batch axes of the other side
        x_mx = x_mx.reshape(4, *x.shape[2:])
    lhs = np.array([[3], [0]]) if sides == "both" else np.array([2, 2, 0, 1])
    rhs = np.array([[1, 0, 2]]) if sides == "both" else np.array([3, 0, 3, 1])
    left = lhs if sides != "right" else None
    right = rhs if sides != "left" else None
    out = mx.gather_qmm(
        x_mx,
        *q,
        lhs_indices=None if left is None else mx.array(left.astype(np.uint32)),
        rhs_indices=None if right is None else mx.array(right.astype(np.uint32)),
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        mode=mode,
        stream=mx.cpu,
    )
    expected = ref.gather_qmm(
        to_numpy(x_mx), *operands(q), left, right, transpose, group_size, bits, mode
    )
    assert out.shape == expected.shape
    assert ref.relative_error(to_numpy(out), expected) < MATMUL_ERROR[dtype]


def test_a_wrong_product_is_seen() -> None:
    """The error that the tests above allow is far below that of one wrong group."""
    q = ref.quantize(weights("plain"), 64, 4)
    x = np.random.default_rng(1).standard_normal((3, 256))
    expected = ref.quantized_matmul(x, *q)
    scales = q.scales.copy()
    scales[:, 0] *= -1
    wrong = ref.quantized_matmul(x, q.w_q, scales, q.biases)
    assert ref.relative_error(wrong, expected) > 10 * max(MATMUL_ERROR.values())
