"""Weights as GPTQ's and AWQ's files have them, and what they are, in NumPy alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ROWS, COLUMNS = 64, 256


def bit_stream(codes: Array, bits: int) -> mx.array:
    """Codes along the last axis as 32-bit words, bit by bit, in Python's own integers."""
    out = []
    for row in codes.reshape(-1, codes.shape[-1]).tolist():
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        out.append([whole >> (32 * i) & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    words = np.array(out, np.uint32).reshape(*codes.shape[:-1], -1)
    return mx.array(words).view(mx.int32)


def awq_words(codes: Array) -> mx.array:
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble, row in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        words |= codes[:, row::8].astype(np.uint32) << np.uint32(4 * nibble)
    return mx.array(words).view(mx.int32)


class Gptq:
    """A random weight, its arrays as files have them, and what it is."""

    def __init__(
        self,
        bits: int,
        group: int = 64,
        *,
        scattered: bool = False,
        v2: bool = False,
        shape: tuple[int, int] = (ROWS, COLUMNS),
    ) -> None:
        rows, columns = shape
        rng = np.random.default_rng(bits + group)
        groups = -(-columns // group)
        codes = rng.integers(0, 2**bits, (columns, rows))
        zeros = rng.integers(0, 2**bits, (groups, rows))
        scales = rng.uniform(0.01, 0.1, (groups, rows)).astype(np.float16)
        self.group = np.arange(columns) // group
        if scattered:
            self.group = rng.permutation(self.group)
        self.qweight = mx.contiguous(bit_stream(codes.T, bits).T)
        self.qzeros = bit_stream(zeros if v2 else (zeros - 1) % 2**bits, bits)
        self.scales, self.g_idx = mx.array(scales), mx.array(self.group, mx.int32)
        self.dense = ((codes - zeros[self.group]) * scales.astype(np.float64)[self.group]).T

    @property
    def arrays(self) -> dict[str, mx.array]:
        names = ("qweight", "scales", "qzeros", "g_idx")
        return {name: getattr(self, name) for name in names}
