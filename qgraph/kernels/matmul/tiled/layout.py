"""A quantized weight laid out in tiles: a lane of a tensor core loads whole what it multiplies.

A tile is 64 rows by 64 columns, and tiles lie in rows of tiles.  In a tile the four warps of a
warpgroup hold 16 rows each.  For every 16 columns a lane of a warp holds eight numbers, four words
of two (PTX ISA, fragments of the left operand of m16n8k16 and of wgmma m64k16); for a whole tile
that is 32 numbers, BITS words.  Numbers of 3, 5 and 6 bits are split into planes, see `PLANES`;
words of 8 and 4 bits are read 16 bytes at a time.

Of the 16 rows that a warp holds, row 2 g + r stands where the fragment has row g + 8 r, so that a
lane holds neighbours of the result.  Scales lie by rows of tiles, groups, rows; a scale and a bias
of half precision are one word, the scale below.

N and K are filled up to multiples of 64 by zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

TILE = 64
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of the planes that numbers are split into, lowest bits first."""

# Axes of the numbers of a matrix in rows, and of its tiles: n = 64 tile + 16 warp + 2 g + r and
# k = 64 tile + 16 step + 8 c + 2 t + h; a lane is (g, t), its words are (step, c, r), halves h.
_AXES = (4, 8, 2), (4, 2, 4, 2)
_TO_TILES = (0, 4, 1, 2, 7, 5, 6, 3, 8)
_TO_ROWS = (0, 2, 3, 7, 1, 5, 6, 4, 8)


def tiled_weight(w: mx.array, bits: int) -> mx.array:
    """Tiles (…, N/64, K/64, 128 bits) of MLX's packed rows (…, N, K bits/32), both uint32.

    >>> w = mx.quantize(mx.random.normal((100, 96)), group_size=32)[0]
    >>> tiles = tiled_weight(w, 4)
    >>> tiles.shape, mx.array_equal(packed_rows(tiles, 4, 100, 96), w).item()
    ((2, 2, 512), True)
    """
    q = _numbers(w, bits)
    *experts, n, k = q.shape
    q = mx.pad(q, [(0, 0)] * len(experts) + [(0, -n % TILE), (0, -k % TILE)])
    rows, columns = q.shape[-2] // TILE, q.shape[-1] // TILE
    q = q.reshape(-1, *_AXES[0], columns, *_AXES[1]).transpose(_TO_TILES)
    lanes = q.reshape(-1, 4, 32, 16, 2)  # tiles, warps, lanes, places, halves
    words = [_plane(lanes, low, width) for low, width in _placed(bits)]
    return mx.concatenate(words, axis=-1).reshape(*experts, rows, columns, 128 * bits)


def packed_rows(tiles: mx.array, bits: int, n: int, k: int) -> mx.array:
    """The inverse of `tiled_weight`: MLX's packed rows (…, N, K bits/32)."""
    *experts, rows, columns, _ = tiles.shape
    words = tiles.reshape(-1, 4, 32 * bits)
    lanes = mx.zeros((words.shape[0], 4, 32, 16, 2), mx.uint32)
    at = 0
    for low, width in _placed(bits):
        lanes = lanes | _of_plane(words[..., at : at + 32 * width], low, width)
        at += 32 * width
    q = lanes.reshape(-1, columns, 4, 8, 4, 4, 2, 2, 2).transpose(_TO_ROWS)
    q = q.reshape(*experts, rows * TILE, columns * TILE)[..., :n, :k]
    return _packed(q, bits)


def padded(size: int) -> int:
    """N or K filled up to whole tiles."""
    return -(-size // TILE) * TILE


def tiled_scales(parts: Sequence[mx.array], group_size: int) -> mx.array:
    """Scales, and biases if there are any, (…, N, G), as (…, N/64, G', 64).

    G' are the groups of K filled up to a multiple of 64.
    """
    both = parts[0]
    if len(parts) == 2:
        low, high = (part.view(mx.uint16).astype(mx.uint32) for part in parts)
        both = low | high << 16
    *experts, n, groups = both.shape
    fill = padded(groups * group_size) // group_size - groups
    both = mx.pad(both, [(0, 0)] * len(experts) + [(0, -n % TILE), (0, fill)])
    return mx.contiguous(both.reshape(*experts, -1, TILE, groups + fill).swapaxes(-1, -2))


def scales_of(tiles: mx.array, dtype: mx.Dtype, n: int, groups: int) -> list[mx.array]:
    """The inverse of `tiled_scales`: [scales, biases] of half precision `dtype`, or [scales]."""
    *experts, _, _, _ = tiles.shape
    both = tiles.swapaxes(-1, -2).reshape(*experts, -1, tiles.shape[-2])[..., :n, :groups]
    return _halves(both, dtype)


def _halves(both: mx.array, dtype: mx.Dtype) -> list[mx.array]:
    """Scales and biases that stand in one word; scales alone of a byte."""
    if both.dtype == mx.uint8:
        return [both]
    halves = [(both & 0xFFFF).astype(mx.uint16), (both >> 16).astype(mx.uint16)]
    return [half.view(dtype) for half in halves]


def _placed(bits: int) -> list[tuple[int, int]]:
    """The planes of numbers of `bits` bits: lowest bit and width."""
    planes, low = [], 0
    for width in PLANES[bits]:
        planes.append((low, width))
        low += width
    return planes


def _plane(lanes: mx.array, low: int, width: int) -> mx.array:
    """Words (tiles, warps, 32 width) of a plane of numbers (tiles, warps, lanes, 16, 2)."""
    each, together = 16 // width, min(4, width)
    part = (lanes >> low) & ((1 << width) - 1)
    part = part.reshape(*lanes.shape[:3], width, each, 2).astype(mx.uint32)
    words = (part << _shifts(width)).sum(axis=(-1, -2))
    words = words.reshape(*lanes.shape[:3], width // together, together)
    return words.swapaxes(-2, -3).reshape(*lanes.shape[:2], -1)


def _of_plane(words: mx.array, low: int, width: int) -> mx.array:
    """The inverse of `_plane`, its bits from `low` up."""
    together = min(4, width)
    lanes = words.reshape(*words.shape[:2], width // together, 32, together).swapaxes(-2, -3)
    part = lanes.reshape(*words.shape[:2], 32, width, 1, 1) >> _shifts(width)
    return (part & ((1 << width) - 1)).reshape(*words.shape[:2], 32, 16, 2) << low


def _shifts(width: int) -> mx.array:
    """Where in a word a number of a plane lies, by its place and half."""
    place, half = mx.arange(16 // width, dtype=mx.uint32), mx.arange(2, dtype=mx.uint32)
    return place[:, None] * width + half * 16


def _numbers(w: mx.array, bits: int) -> mx.array:
    """Numbers (…, K), uint8, of rows packed as a stream of bits, lowest first."""
    if bits == 8:
        return w.view(mx.uint8)
    together = bits // math.gcd(bits, 32)  # words that hold whole numbers
    words = w.reshape(*w.shape[:-1], -1, together)
    starts = range(0, 32 * together, bits)
    q = [_between(words, start // 32, start % 32, bits) for start in starts]
    return mx.stack(q, axis=-1).reshape(*w.shape[:-1], -1)


def _between(words: mx.array, at: int, bit: int, bits: int) -> mx.array:
    """The number that begins at a bit of word `at`, and may end in the next."""
    value = words[..., at] >> bit
    if bit + bits > 32:
        value = value | words[..., at + 1] << (32 - bit)
    return (value & ((1 << bits) - 1)).astype(mx.uint8)


def _packed(q: mx.array, bits: int) -> mx.array:
    """The inverse of `_numbers`, of uint32."""
    together = bits // math.gcd(bits, 32)
    q = q.reshape(*q.shape[:-1], -1, 32 * together // bits)
    words: list[mx.array] = [mx.zeros(q.shape[:-1], mx.uint32)] * together
    for i in range(q.shape[-1]):
        at, bit = divmod(i * bits, 32)
        words[at] = words[at] | q[..., i] << bit
        if bit + bits > 32:
            words[at + 1] = words[at + 1] | q[..., i] >> (32 - bit)
    return mx.stack(words, axis=-1).reshape(*q.shape[:-2], -1)


def rows_of_tiles(tiles: mx.array, bits: int, rows: mx.array, k: int) -> mx.array:
    """Some of MLX's packed rows (…, K bits/32), without the others.

    Args:
        tiles: of one matrix.
        rows: their numbers (…), none below 0.

    >>> w = mx.quantize(mx.random.normal((100, 96)), group_size=32)[0]
    >>> ids = mx.array([[3, 99], [3, 64]])
    >>> mx.array_equal(rows_of_tiles(tiled_weight(w, 4), 4, ids, 96), w[ids]).item()
    True
    """
    flat = rows.flatten()[:, None]
    warp, g, r = flat % TILE // 16, flat % 16 // 2, flat % 2
    q, begin = mx.zeros((flat.size, tiles.shape[-2], 4, 2, 4, 2), mx.uint32), 0
    for low, width in _placed(bits):
        together = min(4, width)
        word, t = mx.arange(width)[:, None], mx.arange(4)
        lane = 4 * g[..., None] + t
        at = (word // together * 32 + lane) * together + word % together
        own = (warp * 32 * bits + begin)[..., None] + at  # rows, words, t
        words = tiles[flat[..., None] // TILE, :, own]  # rows, words, t, tiles of columns
        place = mx.arange(16).reshape(4, 2, 2)[..., 0]  # of step and c; r comes on top
        each = 16 // width
        shift = (place % each * width)[..., None] + mx.arange(2) * 16  # step, c, h
        moved = shift.astype(mx.uint32) + (r * width).astype(mx.uint32)[..., None, None]
        mine = words[:, place // each].transpose(0, 4, 1, 2, 3)[..., None]
        part = mine >> moved.reshape(-1, 1, 4, 2, 1, 2)
        q = q | (part & ((1 << width) - 1)) << low
        begin += 32 * width
    return _packed(q.reshape(*rows.shape, -1)[..., :k], bits)


def scales_of_rows(tiles: mx.array, dtype: mx.Dtype, rows: mx.array, groups: int) -> list[mx.array]:
    """[scales, biases] (…, groups) of some rows, or [scales]: see `rows_of_tiles`."""
    both = tiles[rows // TILE, :, rows % TILE][..., :groups]
    return _halves(both, dtype)
