"""The numbers that a fit found for weights, which take the place of plain rounding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

_SAMPLES = 4096


@dataclass(frozen=True, eq=False)
class Fitted:
    """A packed weight that a fit made, and what it says of it.

    Attributes:
        weight: codes, uint32 (..., columns · bits / 32).
        scales, biases: (..., columns / group_size); no biases but in affine.
        bits, group_size, mode: as for `mx.quantize`.
        mark: of the float weight that it stands for, as `mark_of` gives it.
        method: how the numbers were found, in words.
        error: what rounding changes the products by, as a share of them: the root of a mean square.
        sensitivity: what the rounding is expected to cost at the result, in nats a token for
            logits; None where it was not asked for.
        prices: bytes and such a cost of each format that might have been chosen.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    bits: int
    group_size: int
    mode: str
    mark: str
    method: str
    error: float
    sensitivity: float | None = None
    prices: Sequence[tuple[int, float]] = ()

    @property
    def parts(self) -> tuple[mx.array, ...]:
        """As `mx.quantize` gives them."""
        return (self.weight, self.scales, *(() if self.biases is None else (self.biases,)))

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `mx.quantize`."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it stands for."""
        return (*self.weight.shape[:-1], self.weight.shape[-1] * 32 // self.bits)

    def dense(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The weight that it is, as products in `dtype` see it."""
        w, scales, biases = self.weight, self.scales, self.biases
        if biases is not None:
            scales, biases = scales.astype(dtype), biases.astype(dtype)
        return mx.dequantize(w, scales, biases, **self.settings, dtype=dtype)

    def __repr__(self) -> str:
        return (
            f"Fitted({self.mode}, {self.bits} bits, groups of {self.group_size}, "
            f"shape {self.shape}, by {self.method}, error {self.error:.3%})"
        )


def mark_of(weight: mx.array) -> str:
    """A mark by which a weight is known again: of its shape and of some thousand of its numbers.

    >>> a = mx.arange(64, dtype=mx.float32).reshape(2, 32)
    >>> mark_of(a) == mark_of(a + 0), mark_of(a) == mark_of(a + 1)
    (True, False)
    """
    picked = samples(weight.size)
    return sampled_mark(weight.shape, weight.reshape(-1)[picked.start : picked.stop : picked.step])


def samples(size: int) -> range:
    """Which of so many numbers a mark looks at."""
    return range(0, size, max(1, size // _SAMPLES))


def sampled_mark(shape: tuple[int, ...], numbers: mx.array) -> str:
    """The mark of a weight with these numbers at `samples`."""
    sample = np.array(numbers.astype(mx.float32))
    return hashlib.blake2b(repr(shape).encode() + sample.tobytes(), digest_size=8).hexdigest()
