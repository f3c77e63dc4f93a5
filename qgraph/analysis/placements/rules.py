"""The table of rules: for each op how its axes belong together.

An op whose rule is None is carried out whole on every rank, which is right for any op: it gets its
operands replicated and gives its results so.
"""

from __future__ import annotations

from collections.abc import Callable

from ...ir.graph import Node
from ...ir.ops import OPS
from . import attention, elementwise, picking, products, shapes
from .spec import Spec

Rule = Callable[[Node], Spec | None]

_REPLICATED_KINDS = frozenset({"random", "fft", "linear algebra", "chosen kernels", "collective"})
"""Kinds of ops that every rank carries out whole."""

_REPLICATED = frozenset(
    {"allclose", "arange", "array_equal", "as_strided", "atleast_1d", "atleast_2d",
     "atleast_3d", "bartlett", "blackman", "block_masked_mm", "broadcast_arrays",
     "conv_general", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolve",
     "count_nonzero", "diag", "diagonal", "diff", "eye", "fast.cross_entropy",
     "fast.gated_delta_update", "from_fp8", "gather_qqmm", "hadamard_transform", "hamming",
     "hanning", "identity", "inner", "keep", "kron", "linspace", "median", "meshgrid",
     "minmax", "outer", "put_along_axis", "qqmm", "repeat", "roll", "searchsorted",
     "segmented_mm", "tensordot", "tile", "to_fp8", "tri", "tril", "triu", "unique",
     "unstack", "vecdot", "view"}
)  # fmt: skip
"""Single ops likewise: nobody has needed them split."""

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **picking.RULES,
    **products.RULES,
    **attention.RULES,
}


def has_answer(op: str) -> bool:
    """Is it said of this op how it lies on a mesh?"""
    return (
        op in RULES
        or op in _REPLICATED
        or OPS[op].kind in _REPLICATED_KINDS
        or OPS[op].kind == "placement"
    )


def spec_of(node: Node) -> Spec | None:
    """How the axes of a node belong together; None where it is carried out whole."""
    rule = RULES.get(node.op)
    return None if rule is None else rule(node)
