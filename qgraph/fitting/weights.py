"""The weights of a graph that may be quantized.

`quantize-weights` says which they are; sunk and fused as always, every product and row lookup reads
its weight through a `quantize` node, in loops too.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..ir.graph import Graph, Node, Value
from ..passes import (
    EliminateCommonSubexpressions,
    EliminateDeadCode,
    FoldConstants,
    FuseQuantizedMatmul,
    QuantizeWeights,
    RaiseAttention,
    RaiseLayerNorm,
    RaiseRmsNorm,
    RaiseRope,
    Simplify,
    SinkDequantize,
)
from ..quantization.config import Quantize
from ..rewrite.ledger import collecting

PRODUCTS = frozenset({"quantized_matmul", "gather_qmm"})


@dataclass(frozen=True)
class Weight:
    """A weight to fit.

    Attributes:
        uses: nodes that multiply by it or look its rows up, those in bodies of loops included.
        inside: one of them lies in the body of a loop.
    """

    name: str
    source: Value
    uses: tuple[Node, ...]
    inside: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def array(self) -> mx.array:
        array: mx.array = self.source.node.args["data"].array
        return array

    @property
    def waits(self) -> bool:
        """Can it be fitted when the one product that reads it is reached?"""
        return not self.inside and len(self.uses) == 1 and self.uses[0].op in PRODUCTS


@dataclass(frozen=True)
class Prepared:
    """A graph in which each weight to fit is read through its `quantize`."""

    graph: Graph
    weights: dict[str, Weight]


def prepared(graph: Graph, config: Quantize) -> Prepared:
    """The graph with a `quantize` before every weight that `config` and its readers allow."""
    with collecting():
        for run in (
            EliminateDeadCode(), QuantizeWeights(config), EliminateDeadCode(), RaiseLayerNorm(),
            RaiseRmsNorm(), RaiseRope(), RaiseAttention(), FoldConstants(), Simplify(),
            EliminateCommonSubexpressions(), SinkDequantize(), FuseQuantizedMatmul(),
            EliminateDeadCode(),
        ):  # fmt: skip
            graph = run(graph)
    weights = {}
    for node in graph.nodes:
        source = node.operand("w") if node.op == "quantize" else None
        if source is None or source.node.op != "constant" or not source.node.args["name"]:
            continue
        uses, inside = _uses(graph, node)
        name = source.node.args["name"]
        weights[name] = Weight(name, source, tuple(uses), inside)
    return Prepared(graph, weights)


def _uses(graph: Graph, node: Node) -> tuple[list[Node], bool]:
    """What reads a packed weight through views and loops, and whether some of it is in a loop."""
    from ..ir.loops import bodies

    found: list[Node] = []
    inside = False
    seen = set(node.outputs)
    pending = [(graph, value) for value in node.outputs]
    while pending:
        where, value = pending.pop()
        for user in where.users.get(value, ()):
            if user.bodies:
                inside = True
                for body in bodies(user):
                    entries = [inner for inner, outer in body.shared if outer is value]
                    xs = user.args.get("xs", ())
                    entries += [s for s, x in zip(body.slices, xs, strict=False) if x is value]
                    pending += [(body.graph, inner) for inner in entries]
            elif user.op in PRODUCTS or user.op == "dequantize":
                if user not in found:
                    found.append(user)
            else:
                for output in user.outputs:
                    if output not in seen:
                        seen.add(output)
                        pending.append((where, output))
    return found, inside
