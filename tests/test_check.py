"""`plan.check` finds a wrong pass and its first wrong node in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.errors import ContractError
from qgraph.ir import Graph, Node, Value
from qgraph.rewrite import rewrite
from qgraph.tensor import Tensor

W = mx.random.normal((64, 64), key=mx.random.key(0)) / 8
X = mx.random.normal((2, 64), key=mx.random.key(1))


@dataclass(frozen=True)
class Slightly:
    """Replaces each `op` by what differs from it by `by`, relatively."""

    op: str
    by: float
    contract: str = "exact"
    name: str = "slightly-wrong"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, lambda _: self.visit, self.name)

    def visit(self, node: Node) -> Sequence[Value] | None:
        if node.op != self.op:
            return None
        kept = node.replace()
        return [(Tensor(kept.output) * (1 + self.by)).value]


def model(x: Any) -> Any:
    h = qg.quantized_matmul(x, W)
    h = qg.sigmoid(h) + 1
    return qg.fori_loop(0, 2, lambda i, h: qg.tanh(qg.quantized_matmul(h, W)), h) * 2


def test_the_default_passes_keep_their_contracts() -> None:
    qg.optimize(qg.trace(model, X)).check(X)

    def conditional(x: Any, n: Any) -> Any:
        y = qg.cond(x.sum() > 0, lambda h: h @ W, lambda h: h * 2, x)
        return qg.fori_loop(0, n, lambda i, h: h @ qg.dequantize(*mx.quantize(W)).T, y)

    qg.optimize(qg.trace(conditional, X, mx.array(2))).check(X, mx.array(2))


def test_parameters() -> None:
    graph = qg.trace(lambda w, x: qg.quantized_matmul(x, w), W, X, parameters=[0])
    qg.optimize(graph).check(W, X)
    with pytest.raises(ContractError, match="slightly-wrong"):
        qg.optimize(graph, passes=[*qg.default_passes(), Slightly("quantized_matmul", 1e-2)]).check(
            W, X
        )


@pytest.mark.parametrize(
    ("op", "line"),
    [("sigmoid", "h = qg.sigmoid(h) + 1"), ("tanh", "qg.tanh(qg.quantized_matmul(h, W))")],
)
def test_it_names_pass_and_node(op: str, line: str) -> None:
    passes = [*qg.default_passes(), Slightly(op, 1e-3), *qg.default_passes()]
    with pytest.raises(ContractError) as caught:
        qg.optimize(qg.trace(model, X), passes=passes).check(X)
    text = str(caught.value)
    assert "the pass slightly-wrong changes what" in text
    assert op in text.split("changes what ")[1].split(" gives")[0]
    assert line in text
    assert "exact was promised" in text


def test_contracts() -> None:
    graph = qg.trace(model, X)
    qg.optimize(graph, passes=[Slightly("sigmoid", 1e-6, "tolerance")]).check(X)
    with pytest.raises(ContractError, match=r"at most 0\.0001 was promised"):
        qg.optimize(graph, passes=[Slightly("sigmoid", 1e-2, "tolerance")]).check(X)
    with pytest.raises(ContractError, match="exact was promised"):
        qg.optimize(graph, passes=[Slightly("sigmoid", 1e-6)]).check(X)
