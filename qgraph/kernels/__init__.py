"""Kernels: the ways of carrying out a quantized matmul with what MLX and NumPy have."""

from .base import EXACT, Kernel, Packed, Problem, Streams, carry_out
from .names import KERNELS, candidates, kernel, names_to_try, plain, refusal

__all__ = [
    "EXACT",
    "KERNELS",
    "Kernel",
    "Packed",
    "Problem",
    "Streams",
    "candidates",
    "carry_out",
    "kernel",
    "names_to_try",
    "plain",
    "refusal",
]
