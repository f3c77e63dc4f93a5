"""`plan.check` finds a wrong pass and its first wrong node in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.errors import ContractError
from qgraph.ir import Graph, Node, Value
from qgraph.passes import QuantizeWeights
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.tracing.tensor import Tensor

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
        return rewrite_each(graph, self.visit, self.name)

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


LOOPS: dict[str, Callable[[Any], Any]] = {
    "fori_loop": lambda x: qg.fori_loop(0, 3, lambda i, h: qg.sigmoid(h) * 2, x),
    "fori_loop of unknown length": lambda x: qg.fori_loop(
        0, qg.sum(x[0] > 99).astype(mx.int32) + 2, lambda i, h: qg.sigmoid(h) * 2, x
    ),
    "scan": lambda x: qg.scan(lambda h, y: (qg.sigmoid(h) + y, h), x, W[:3]),
    "scan in reverse": lambda x: qg.scan(
        lambda h, y: (qg.sigmoid(h) + y, h), x, W[:3], reverse=True
    )[1],
    "while_loop": lambda x: qg.while_loop(
        lambda c: c[1] < 3, lambda c: (qg.sigmoid(c[0]), c[1] + 1), (x, mx.array(0))
    )[0],
    "the test of a while_loop": lambda x: qg.while_loop(
        lambda h: qg.sigmoid(h).max() < 0.99996, lambda h: h + 0.5, x
    ),
    "cond, true": lambda x: qg.cond(x[0, 0] == x[0, 0], qg.sigmoid, lambda h: h, x),
    "cond, false": lambda x: qg.cond(x[0, 0] != x[0, 0], lambda h: h, qg.sigmoid, x),
    "the last turn of a loop": lambda x: qg.fori_loop(
        0, 4, lambda i, h: qg.where(i == 3, qg.sigmoid(h), h), x
    ),
    "loops in loops": lambda x: qg.scan(
        lambda h, _: (
            qg.fori_loop(
                0,
                2,
                lambda i, h: qg.cond(i == 1, lambda h: qg.sigmoid(h) * 2, lambda h: h, h),
                h,
            ),
            h.sum(),
        ),
        x,
        length=2,
    )[0],
}


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("name", LOOPS)
def test_it_names_the_node_in_every_kind_of_loop(name: str, around: bool) -> None:
    """With passes that rebuild the loops around, and without."""
    extra = qg.default_passes() if around else []
    graph = qg.trace(LOOPS[name], X)
    qg.optimize(graph, passes=extra).check(X)
    with pytest.raises(ContractError, match="changes what sigmoid gives") as caught:
        qg.optimize(graph, passes=[*extra, Slightly("sigmoid", 1e-3), *extra]).check(X)
    assert "sigmoid" in str(caught.value).splitlines()[2]


@dataclass(frozen=True)
class ByHand:
    """Adds to each tanh in the bodies of loops, without `rewrite`, so that it notes nothing."""

    name: str = "by-hand"
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        now: dict[Value, Value] = {}
        nodes = []
        for node in graph.nodes:
            new = node.replace(bodies=tuple(map(self, node.bodies))) if node.bodies else node
            new = new.with_inputs(now)
            now.update(zip(node.outputs, new.outputs, strict=True))
            nodes.append(new)
            if node.op == "tanh":
                now[node.output] = (Tensor(new.output) + 0.1).value
                nodes += [v.node for v in now[node.output].node.inputs[1:]]
                nodes.append(now[node.output].node)
        return graph.replace(nodes=nodes, outputs=[now.get(v, v) for v in graph.outputs])


def test_a_pass_that_notes_nothing() -> None:
    def fn(x: Any) -> Any:
        def turn(h: Any, _: Any) -> Any:
            h = qg.tanh(h)
            return qg.exp(-h), h

        return qg.scan(turn, x, length=3)

    with pytest.raises(ContractError, match="the pass by-hand changes what negative gives"):
        qg.optimize(qg.trace(fn, X), passes=[ByHand()]).check(X)


QUANTIZED = {
    "constants": lambda x: qg.tanh(x @ W.T) @ W,
    "in a loop": lambda x: qg.fori_loop(0, 2, lambda i, h: qg.tanh(h @ W.T), x),
    "in a branch": lambda x: qg.cond(x.sum() > 0, lambda h: h @ W, lambda h: h @ W.T, x),
    "rows": lambda x: x + qg.take(qg.tensor(W), mx.array([3, 1]), axis=0),
}


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights(name: str, mode: str) -> None:
    """What is compared is the graph with dense weights that went through quantization."""
    graph = qg.trace(QUANTIZED[name], X)
    config = qg.Quantize(mode=mode)
    plan = qg.optimize(graph, quantize=config)
    assert "quantize" in [n.op for _, n in plan.graph.walk()]
    plan.check(X)
    with pytest.raises(ContractError, match="the pass quantize-weights changes what"):
        qg.optimize(
            graph, passes=[Then(QuantizeWeights(config), Slightly("dequantize", 1e-3))]
        ).check(X)


def test_quantized_parameters() -> None:
    graph = qg.trace(lambda w, x: qg.tanh(x @ w.T), W, X, parameters=[0])
    qg.optimize(graph, quantize=qg.Quantize(bits=8)).check(W, X)
    broken = mx.where(mx.arange(64) == 3, mx.inf, W)
    with pytest.raises(ContractError, match="steps of its group, 1 was promised"):
        qg.optimize(graph, quantize=qg.Quantize(bits=8)).check(broken, X)


@dataclass(frozen=True)
class Then:
    """Two passes as one, with the promise of the first."""

    first: QuantizeWeights
    second: Slightly

    @property
    def name(self) -> str:
        return self.first.name

    @property
    def contract(self) -> str:
        return self.first.contract

    def __call__(self, graph: Graph) -> Graph:
        return self.second(self.first(graph))


def test_a_weight_of_half_precision_under_a_product_of_float32() -> None:
    parts = mx.quantize(W.astype(mx.float16))
    graph = qg.trace(lambda x: x @ qg.dequantize(*parts).astype(mx.float32).T, X)
    plan = qg.optimize(graph)
    assert "quantized_matmul" in [n.op for n in plan.graph.nodes]
    plan.check(X)
    with pytest.raises(ContractError, match=r"at most 0\.02 was promised"):
        qg.optimize(graph, passes=[Slightly("matmul", 3e-2, "tolerance")]).check(X)


def test_equal_quantizes_in_an_unrolled_loop() -> None:
    """Under `mx.compile` the graph as written fails; it is not compiled to be checked."""
    w = qg.tensor(W)
    loop = qg.trace(
        lambda x: qg.fori_loop(0, 3, lambda i, h: qg.quantized_matmul(h, w * 0.5), x), X
    )
    qg.optimize(loop).check(X)


def test_contracts() -> None:
    graph = qg.trace(model, X)
    qg.optimize(graph, passes=[Slightly("sigmoid", 1e-6, "tolerance")]).check(X)
    with pytest.raises(ContractError, match=r"at most 0\.0001 was promised"):
        qg.optimize(graph, passes=[Slightly("sigmoid", 1e-2, "tolerance")]).check(X)
    with pytest.raises(ContractError, match="exact was promised"):
        qg.optimize(graph, passes=[Slightly("sigmoid", 1e-6)]).check(X)
