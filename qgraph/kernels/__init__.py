"""Kernels: the ways of carrying out a quantized matmul with what MLX and NumPy have."""

from .base import EXACT, Kernel, Packed, Problem, Streams, carry_out
from .names import BASES, PREFIXES, candidates, kernel, names_to_try, refusal

__all__ = [
    "BASES",
    "EXACT",
    "PREFIXES",
    "Kernel",
    "Packed",
    "Problem",
    "Streams",
    "candidates",
    "carry_out",
    "kernel",
    "names_to_try",
    "refusal",
]
