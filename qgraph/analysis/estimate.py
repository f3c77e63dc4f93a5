"""What a node costs at least: the bytes it must move and the operations it must do.

Bytes are those of operands read once and results written once; views move none.  A multiply-add
counts as two operations, any other function of an element as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..ir.graph import Graph, Node, Value
from ..ir.kinds import GATHERS
from ..ir.loops import HOLDERS, turns
from ..ir.ops import OPS


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes moved and floating-point (or integer) operations; `exact` where nothing is unknown.

    >>> Cost(2048, 10_000_000)
    Cost(2.0 KiB, 10.0 MFLOP)
    """

    nbytes: float = 0
    flops: float = 0
    exact: bool = True

    def __add__(self, other: Cost) -> Cost:
        exact = self.exact and other.exact
        return Cost(self.nbytes + other.nbytes, self.flops + other.flops, exact)

    def times(self, count: int) -> Cost:
        return Cost(self.nbytes * count, self.flops * count, self.exact)

    def __str__(self) -> str:
        sign = "" if self.exact else ">="
        return f"{sign}{in_bytes(self.nbytes)}, {sign}{in_flops(self.flops)}"

    def __repr__(self) -> str:
        return f"Cost({self})"


def in_bytes(count: float) -> str:
    """Bytes with a binary prefix.

    >>> in_bytes(0), in_bytes(1023), in_bytes(1536), in_bytes(3 * 2**30)
    ('0 B', '1023 B', '1.5 KiB', '3.0 GiB')
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count:.0f} B"


def in_flops(count: float) -> str:
    """Operations with a decimal prefix.

    >>> in_flops(12), in_flops(2_500_000)
    ('12 FLOP', '2.5 MFLOP')
    """
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}FLOP"
    return f"{count:.0f} FLOP"


def estimate(node: Node) -> Cost:
    """The cost of one run of a node; of a loop, of all its turns.

    A loop whose turns only the run can count is counted as one turn, and not `exact`; of the
    branches of a `cond` the one that moves more counts.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: x @ x, qg.spec((64, 64)))
    >>> estimate(graph.nodes[0])
    Cost(32.0 KiB, 524.3 kFLOP)
    """
    if node.op in ("input", "constant"):
        return Cost()
    if node.op not in HOLDERS:
        return Cost(_bytes(node), _flops(node))
    bodies = [total(body) for body in node.bodies]
    if node.op == "cond":
        return max(bodies, key=lambda c: c.nbytes)
    count = turns(node)
    cost = sum(bodies, Cost()).times(1 if count is None else count)
    return cost if count is not None else Cost(cost.nbytes, cost.flops, exact=False)


def total(graph: Graph) -> Cost:
    """The cost of a graph's `run` stage: every node, every turn of its loops."""
    nodes = [n for n in graph.nodes if n.stage == "run" and n.op != "constant"]
    return sum(map(estimate, nodes), Cost())


def _bytes(node: Node) -> int:
    written = sum(v.type.nbytes for v in node.outputs)
    cost = OPS[node.op].cost
    if cost == "view":
        return 0
    if cost in ("write", "update"):
        update = node.value("update") or node.value("updates") or node.value("values")
        return 2 * (update.type.nbytes if update is not None else 0)
    read = dict.fromkeys(node.inputs)
    if cost == "pick":
        first = node.inputs[0]
        others = sum(v.type.nbytes for v in read if v is not first)
        return min(written, first.type.nbytes) + others + written
    if node.op in GATHERS:
        return sum(_picked_bytes(v, node) for v in read) + written
    return sum(v.type.nbytes for v in read) + written


def _picked_bytes(value: Value, node: Node) -> int:
    """Of an operand of a gathered product: of matrices, as many as there are products."""
    if value in (node.inputs[0], node.value("lhs_indices"), node.value("rhs_indices")):
        return value.type.nbytes
    matrices = max(1, math.prod(value.shape[:-2]))
    picked = min(matrices, math.prod(node.output.shape[:-2]))
    return value.type.nbytes // matrices * picked


def _flops(node: Node) -> float:
    cost = OPS[node.op].cost
    if cost == "own":
        return FORMULAS[node.op](node)
    if cost in ("each", "update"):
        return max([v.type.size for v in (*node.inputs, *node.outputs)], default=0)
    return 0


def _matmul(node: Node, first: str = "a") -> float:
    return 2.0 * node.output.type.size * node.operand(first).shape[-1]


def _attention(node: Node) -> float:
    q, k, v = (node.operand(name) for name in ("q", "k", "v"))
    pairs = math.prod(q.shape[:-1]) * k.shape[-2]
    return 2.0 * pairs * (q.shape[-1] + v.shape[-1]) + 4.0 * pairs


def _cached_attention(node: Node) -> float:
    y, keys = node.output, node.operand("keys")
    pairs = math.prod(y.shape[:-1]) * keys.shape[-2]
    return 4.0 * pairs * (y.shape[-1] + 1) + 3.0 * math.prod(y.shape)


def _convolution(node: Node) -> float:
    weight = _any(node, "weight")
    return 2.0 * node.output.type.size * math.prod(weight.shape[1:])


def _any(node: Node, name: str) -> Value:
    return node.value(name) or node.inputs[1]


def _per_input(count: int) -> Callable[[Node], float]:
    return lambda node: float(count * node.inputs[0].type.size)


FORMULAS: dict[str, Callable[[Node], float]] = {
    "matmul": _matmul,
    "addmm": lambda node: _matmul(node) + node.output.type.size,
    "quantized_matmul": lambda node: _matmul(node, "x"),
    "packed_matmul": lambda node: _matmul(node, "x"),
    "packed_gather": lambda node: _matmul(node, "x"),
    "gather_qmm": lambda node: _matmul(node, "x"),
    "gather_mm": _matmul,
    "dequantize": lambda node: 2.0 * node.output.type.size,
    "quantize": _per_input(4),
    "softmax": _per_input(4),
    "logsumexp": _per_input(3),
    "sigmoid": _per_input(3),
    "fast.rms_norm": _per_input(4),
    "fast.layer_norm": _per_input(7),
    "fast.rope": _per_input(3),
    "fast.scaled_dot_product_attention": _attention,
    "decode_attention": _attention,
    "cached_attention": _cached_attention,
    "tail_attention": _cached_attention,
    **{f"conv{n}d": _convolution for n in (1, 2, 3)},
    "conv_general": _convolution,
}
"""Operations of ops whose cost the table leaves to a formula."""
