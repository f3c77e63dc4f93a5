"""Kinds of ops, for all who ask what an op is."""

from __future__ import annotations

VIEWS = frozenset(
    {"transpose", "matrix_transpose", "swapaxes", "moveaxis", "expand_dims", "squeeze", "reshape",
     "flatten", "unflatten", "astype", "broadcast_to", "stop_gradient", "contiguous", "positive"}
)  # fmt: skip
"""Ops that give their first operand again, laid out in another way or cast."""


PRODUCTS = frozenset(
    {"matmul", "addmm", "einsum", "tensordot", "inner", "gather_mm", "quantized_matmul",
     "gather_qmm"}
)  # fmt: skip
