"""What passes and rules promise of their results, and how far two results may be apart."""

from __future__ import annotations

import mlx.core as mx

from ..ir.graph import Graph

TOLERANCE = {mx.bfloat16: 1e-1, mx.float16: 2e-2}
"""Relative error allowed to a pass that promises one, by the coarsest dtype; 1e-4 for others."""

EXACT = "exact"

ROUNDED_WEIGHTS = "rounded weights"
"""Of `quantize-weights`: bit for bit what dense weights give that went through quantization, each
of which is within a step of its group of what it was."""


def allowance(contract: str, dtype: mx.Dtype) -> float:
    """The relative error that a contract allows.

    Contracts: "exact"; "rounded weights", which is exact but for those; "dtype-preserving" and
    "tolerance", what a dtype is good for; and a number of their own, such as "tolerance 1e-3".

    >>> allowance("exact", mx.float32), allowance("tolerance 1e-3", mx.float32)
    (0.0, 0.001)
    """
    word, _, number = contract.partition(" ")
    if contract in (EXACT, ROUNDED_WEIGHTS):
        return 0.0
    if word not in ("dtype-preserving", "tolerance"):
        raise ValueError(
            f"contract {contract!r}: give 'exact', 'dtype-preserving' or 'tolerance 1e-3'"
        )
    return float(number) if number else TOLERANCE.get(dtype, 1e-4)


def is_contract(contract: object) -> bool:
    """Is it one that `allowance` knows?

    >>> is_contract("tolerance 1e-3"), is_contract("foo")
    (True, False)
    """
    try:
        return isinstance(contract, str) and allowance(contract, mx.float32) >= 0
    except ValueError:
        return False


def coarsest(graph: Graph) -> mx.Dtype:
    """Of the float dtypes in a graph, the one that rounds most.

    A weight of float16 leaves its mark on a product of float32.

    >>> import qgraph as qg
    >>> coarsest(qg.trace(lambda x: x.astype(mx.float16) + 1.0, qg.spec(4)))
    mlx.core.float16
    """
    found = {v.dtype for _, node in graph.walk() for v in node.outputs}
    return next((d for d in TOLERANCE if d in found), mx.float32)


def difference(old: mx.array, new: mx.array, contract: str, coarse: mx.Dtype = mx.float32) -> str:
    """How two results differ beyond `contract`, in words; empty if they do not.

    Args:
        coarse: the coarsest dtype that they were computed in.

    >>> difference(mx.array([1.0]), mx.array([1.5]), "exact")
    'relative error 0.5, exact was promised'
    """
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{new.dtype} {tuple(new.shape)} instead of {old.dtype} {tuple(old.shape)}"
    if mx.array_equal(old, new, equal_nan=True):
        return ""
    if not mx.issubdtype(old.dtype, mx.inexact):
        return f"{int(mx.sum(old != new).item())} of {old.size} elements differ"  # type: ignore[arg-type]
    size = mx.linalg.norm(old.astype(mx.float32).flatten())
    away = mx.linalg.norm((new.astype(mx.float32) - old.astype(mx.float32)).flatten())
    error = float(away / mx.maximum(size, 1e-30))
    allowed = max(allowance(contract, dtype) for dtype in (old.dtype, coarse))
    if error <= allowed:
        return ""
    promised = "exact was promised" if not allowed else f"at most {allowed:g} was promised"
    return f"relative error {error:.2g}, {promised}"
