"""`f32+…`: computed in float32, the result cast back; affine scales are packed as float32.

On CPUs MLX's half-precision quantized matmul converts scalar by scalar: it is 8 times (bfloat16)
to 40 times (float16) slower than the float32 one, and rounds more.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..base import HALF, Kernel, Machine, Packed, Problem, Streams, Wrapper

IN_MLX = ("qmm", "dequantize+matmul", "dense")
"""Kernels that compute in the dtype of x; those on the host compute in float32 anyway."""


def in_half(problem: Problem) -> bool:
    """Are x or scales of half precision?"""
    return problem.dtype in HALF or problem.scales_dtype in HALF


class Float32(Wrapper):
    prefix = "f32"
    backends = ("cpu",)

    @classmethod
    def tried(cls, problem: Problem) -> Sequence[str]:
        return [f"f32+{name}" for name in IN_MLX] if in_half(problem) else []

    def __init__(self, inner: Kernel) -> None:
        super().__init__("f32", inner, packs=True)
        self.left_to_mlx = inner.left_to_mlx

    def narrowed(self, problem: Problem) -> Problem:
        return problem.in_float32()

    def applies(self, problem: Problem) -> str | None:
        if not in_half(problem):
            return "x and scales are float32 already"
        return super().applies(problem)

    def contract(self, problem: Problem) -> str:
        return "computed in float32, rounded once at the end: closer to exact arithmetic"

    def extra_bytes(self, problem: Problem) -> int:
        wide = self.narrowed(problem)
        return super().extra_bytes(problem) + wide.packed_bytes - problem.packed_bytes

    def interpolated(self, problem: Problem, machine: Machine) -> float | None:
        us = super().interpolated(problem, machine)
        return self.inner.interpolated(self.narrowed(problem), machine) if us is None else us

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        w, *scales = parts
        if problem.mode == "affine":
            scales = [part.astype(mx.float32) for part in scales]
        return super().pack([w, *scales], problem)

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        y = self.inner.run(x.astype(mx.float32), packed, self.narrowed(problem), streams)
        return y.astype(problem.out_dtype)
