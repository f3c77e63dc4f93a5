"""What is known of ops: the words of the table in `ops.py`, and the sets of ops they make."""

from __future__ import annotations

from .ops import OPS

COSTS = {
    "view": "moves nothing: the result shares its operand's buffer, or may",
    "move": "places elements and computes nothing",
    "pick": "the same, and reads of its first operand no more than it picks",
    "write": "moves what it writes into its first operand, nothing else",
    "update": "the same, and computes an operation for each element",
    "each": "an operation for each element of its largest operand or result, at least",
    "own": "counted by a formula of its own, in `analysis/estimate.py`",
}
TRAITS = {
    "same elements": "gives its first operand again, laid out in another way or cast",
    "strided": "its result may not lie row by row",
    "by a weight": "a product that may take a weight, dense or packed",
    "gathers": "reads of its second operand the matrices that it picks",
}

VIEWS = frozenset(op.name for op in OPS.values() if op.cost == "view")


def _with(trait: str) -> frozenset[str]:
    return frozenset(op.name for op in OPS.values() if trait in op.traits)


SAME_ELEMENTS = _with("same elements")
STRIDED = _with("strided")
PRODUCTS = _with("by a weight")
GATHERS = _with("gathers")

MESSAGES = frozenset({"distributed.send", "distributed.recv"})
"""From rank to rank: each is another one, at every call, though operands be the same."""
