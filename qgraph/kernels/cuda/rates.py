"""What GPUs of the Hopper generation do at best, for the models that kernels have of their time.

The figures were measured on one H100 (mlx 0.32.4), as `choice/measuring.py` measures; those of one
kernel stand in its file.  Models rank kernels where the measured table holds nothing like the
problem; they are no promise.
"""

from __future__ import annotations

LAUNCH_US = 2.5
H100_MEMORY, H200_MEMORY = 2.8e6, 4.0e6
"""Bytes a microsecond, read plus written."""
MATMUL_RATE = 0.75
"""Dense bf16 of cuBLAS, million million operations a millisecond: 8192×8192×8192 at 770 to 790
teraflops."""


def bandwidth(arch: str) -> float:
    """Bytes a microsecond that a GPU's memory moves.

    >>> bandwidth("sm_90 NVIDIA H200") > bandwidth("sm_90 NVIDIA H100 PCIe") == bandwidth("sm_90")
    True
    """
    return H200_MEMORY if "H200" in arch else H100_MEMORY


def matmul_us(nbytes: float, flops: float, arch: str) -> float:
    """Microseconds of a dense product whose larger operand has so many bytes."""
    return LAUNCH_US + max(nbytes / bandwidth(arch), flops / (MATMUL_RATE * 1e9))
