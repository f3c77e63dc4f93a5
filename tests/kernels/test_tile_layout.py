"""The layout of weights in tiles: each number where the tensor cores' fragments want it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qgraph.kernels.matmul.tiled.layout import (
    PLANES,
    packed_rows,
    scales_of,
    tiled_scales,
    tiled_weight,
)
from tests.support.arrays import to_numpy

SIZES = [(64, 64), (100, 96), (70, 320)]


def random_rows(bits: int, n: int, k: int) -> tuple[mx.array, np.ndarray]:
    """Rows packed as MLX packs them, and their numbers: a stream of bits, lowest first."""
    q = np.random.default_rng(bits).integers(0, 1 << bits, (n, k), dtype=np.uint8)
    stream = np.unpackbits(q[..., None], axis=-1, count=bits, bitorder="little").reshape(n, -1)
    return mx.array(np.packbits(stream, axis=-1, bitorder="little").view(np.uint32)), q


@pytest.mark.parametrize("bits", PLANES)
def test_the_streams_are_those_of_mlx(bits: int) -> None:
    rows, q = random_rows(bits, 8, 64)
    ones, zeros = mx.ones((8, 2)), mx.zeros((8, 2))
    assert np.array_equal(to_numpy(mx.dequantize(rows, ones, zeros, group_size=32, bits=bits)), q)


@pytest.mark.parametrize("bits", PLANES)
def test_a_lane_finds_what_it_multiplies(bits: int) -> None:
    """By the tables of the PTX ISA for the left operand of m16n8k16, register by register.

    Register 2 c + r of lane 4 g + t holds columns 8 c + 2 t and the next, of row g + 8 r of the
    fragment, which is row 2 g + r of the weight.
    """
    for n, k in SIZES:
        rows, q = random_rows(bits, n, k)
        tiles = to_numpy(tiled_weight(rows, bits))
        q = np.pad(q, [(0, -n % 64), (0, -k % 64)])
        assert tiles.shape == (q.shape[0] // 64, q.shape[1] // 64, 128 * bits)
        for row, column in np.random.default_rng(1).integers(0, q.shape, (300, 2)):
            warp, g, r = row % 64 // 16, row % 16 // 2, row % 2
            step, c, t, half = column % 64 // 16, column % 16 // 8, column % 8 // 2, column % 2
            words = tiles[row // 64, column // 64].reshape(4, 32 * bits)[warp]
            place = 4 * step + 2 * c + r
            assert number(words, bits, 4 * g + t, place, half) == q[row, column]


def number(words: np.ndarray, bits: int, lane: int, place: int, half: int) -> int:
    """One of the two numbers of a place, of the words of a warp, plane by plane."""
    value = low = begin = 0
    for width in PLANES[bits]:
        each, together = 16 // width, min(4, width)
        plane = words[begin : begin + 32 * width].reshape(-1, 32, together)[:, lane].ravel()
        part = int(plane[place // each]) >> (place % each * width + 16 * half)
        value |= (part & ((1 << width) - 1)) << low
        low, begin = low + width, begin + 32 * width
    return value


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_rows_come_back(bits: int, n: int, k: int) -> None:
    rows, _ = random_rows(bits, n, k)
    assert mx.array_equal(packed_rows(tiled_weight(rows, bits), bits, n, k), rows).item()
    experts = mx.stack([rows, rows ^ 1])
    assert mx.array_equal(packed_rows(tiled_weight(experts, bits), bits, n, k), experts).item()


def test_rows_of_odd_length_come_back() -> None:
    """nvfp4 has groups of 16, so that a row may end in the midst of 32 columns."""
    rows, _ = random_rows(4, 3, 80)
    assert mx.array_equal(packed_rows(tiled_weight(rows, 4), 4, 3, 80), rows).item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_scales_come_back(dtype: mx.Dtype) -> None:
    scales, biases = (mx.random.normal((2, 70, 3)).astype(dtype) for _ in range(2))
    tiles = tiled_scales([scales, biases], 32)
    assert tiles.shape == (2, 2, 4, 64)
    for got, want in zip(scales_of(tiles, dtype, 70, 3), (scales, biases), strict=True):
        assert mx.array_equal(got, want).item()
    word = tiles[1, 1, 2, 5].item()  # row 69, group 2
    assert word & 0xFFFF == scales.view(mx.uint16)[1, 69, 2].item()
    assert word >> 16 == biases.view(mx.uint16)[1, 69, 2].item()


def test_scales_of_a_byte_come_back() -> None:
    scales = mx.random.randint(0, 256, (100, 6)).astype(mx.uint8)
    tiles = tiled_scales([scales], 16)
    assert tiles.shape == (2, 8, 64)
    assert mx.array_equal(scales_of(tiles, mx.bfloat16, 100, 6)[0], scales).item()
