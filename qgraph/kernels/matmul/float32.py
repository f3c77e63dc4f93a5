"""`f32+…`: computed in float32, the result cast back; affine scales are packed as float32.

On CPUs MLX's half-precision quantized matmul converts scalar by scalar: it is 8 times (bfloat16)
to 40 times (float16) slower than the float32 one, and rounds more.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..base import HALF, Kernel, Packed, Problem, Streams, Wrapper


class Float32(Wrapper):
    def __init__(self, inner: Kernel) -> None:
        super().__init__("f32", inner, packs=True)

    def narrowed(self, problem: Problem) -> Problem:
        scales = mx.float32 if problem.mode == "affine" else problem.scales_dtype
        return problem.replace(dtype=mx.float32, scales_dtype=scales)

    def applies(self, problem: Problem) -> str | None:
        if problem.dtype not in HALF and problem.scales_dtype not in HALF:
            return "x and scales are float32 already"
        return super().applies(problem)

    def contract(self, problem: Problem) -> str:
        return "computed in float32, rounded once at the end: closer to exact arithmetic"

    def extra_bytes(self, problem: Problem) -> int:
        wide = self.narrowed(problem)
        return super().extra_bytes(problem) + wide.packed_bytes - problem.packed_bytes

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
