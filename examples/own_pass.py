"""Writing a pass of one's own: `x * x` becomes `square(x)`.

    python examples/own_pass.py

A pass is a frozen dataclass: a name, options as fields, and a call from graph to graph.  `rewrite`
walks the graph and its loop bodies; a visit returns what takes a node's place, or None.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

import qgraph as qg
from qgraph.ir import Graph, Node, Value
from qgraph.rewrite import rewrite
from qgraph.tensor import Tensor


@dataclass(frozen=True)
class SquareProducts:
    """Rewrites `multiply(x, x)` as `square(x)`; leaves products of two different tensors alone."""

    name: str = "square-products"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, lambda _: self.visit, self.name)

    def visit(self, node: Node) -> Sequence[Value] | None:
        if node.op != "multiply" or node.args["a"] is not node.args["b"]:
            return None
        return [qg.square(Tensor(node.operand("a"))).value]


def energy(x):
    return qg.fori_loop(0, 3, lambda i, h: h * h + x * 0.5, x)


graph = qg.trace(energy, qg.spec((4,)))
plan = qg.optimize(graph, passes=[SquareProducts(), *qg.default_passes()])
print(plan.graph)
print(plan.report())

x = mx.array([0.1, 0.2, 0.3, 0.4])
program = qg.compile(graph, passes=[SquareProducts()])
print("same as untraced:", mx.allclose(program(x), energy(x)).item())
