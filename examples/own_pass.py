"""Writing rules and passes of one's own.

    python examples/own_pass.py

A rule is two small functions in the DSL, the pattern and its replacement, with a `check` that says
why a match must be left alone.  Where that is not enough, a pass is a frozen dataclass: a name,
options as fields, and a call from graph to graph.  `rewrite` walks the graph and its loop bodies; a
visit returns what takes a node's place, or None.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

import qgraph as qg
from qgraph.errors import ContractError
from qgraph.ir import Graph, Node, Value
from qgraph.rewrite import ApplyRules, Match, Rule
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.tracing.tensor import Tensor


def is_float(match: Match) -> str | None:
    return None if mx.issubdtype(match["x"].dtype, mx.floating) else "x holds integers"


# x * sigmoid(x) is x / (1 + exp(-x)), to within rounding.
SILU = Rule(
    "silu",
    pattern=lambda x: x * qg.sigmoid(x),
    replacement=lambda x: x / (1 + qg.exp(-x)),
    check=is_float,
    contract="tolerance 1e-5",
)


@dataclass(frozen=True)
class SquareProducts:
    """Rewrites `multiply(x, x)` as `square(x)`; leaves products of two different tensors alone."""

    name: str = "square-products"
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite_each(graph, self.visit, self.name)

    def visit(self, node: Node) -> Sequence[Value] | None:
        if node.op != "multiply" or node.args["a"] is not node.args["b"]:
            return None
        return [qg.square(Tensor(node.operand("a"))).value]


def energy(x):
    h = qg.sigmoid(x) * x
    return qg.fori_loop(0, 3, lambda i, h: h * h + x * 0.5, h)


graph = qg.trace(energy, qg.spec((4,)))
plan = qg.optimize(graph, passes=[ApplyRules((SILU,)), SquareProducts(), *qg.default_passes()])
print(plan.graph)
print(plan.report())
print(*plan.ledger(), sep="\n")

x = mx.array([0.1, 0.2, 0.3, 0.4])
plan.check(x)
program = qg.compile(graph, passes=[ApplyRules((SILU,)), SquareProducts()])
print("same as untraced:", mx.allclose(program(x), energy(x)).item())

# A wrong rule is found in one call.
wrong = Rule("wrong", lambda x: qg.sigmoid(x), lambda x: qg.tanh(x))
try:
    qg.optimize(graph, passes=[ApplyRules((wrong,)), *qg.default_passes()]).check(x)
except ContractError as error:
    print(error)
