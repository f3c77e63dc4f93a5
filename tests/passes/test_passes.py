"""The general passes: text before and after, near misses, nested loops."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.analysis.verify import verify
from qgraph.errors import VerifyError
from qgraph.ir import Graph, Node
from qgraph.passes import (
    AssignStreams,
    EliminateCommonSubexpressions,
    EliminateDeadCode,
    FoldConstants,
    HoistQuantize,
    Simplify,
)
from qgraph.target import Target
from tests.support.arrays import to_numpy

X = mx.random.normal((2, 4), key=mx.random.key(0))
C = mx.array([1.0, 2.0, 3.0, 4.0])
TWO_CORES = Target(mx.Device(mx.cpu, 0), "cpu", "x86_64", 2)


def after(run: Any, fn: Any, *args: Any) -> tuple[Graph, str]:
    """What `run` makes of the traced function, verified, its numbers unchanged."""
    graph = qg.trace(fn, *args, name="f")
    result = run(graph)
    verify(result)
    arrays = [a for a in args if isinstance(a, mx.array)]
    expected = qg.tree.flatten(fn(*arrays))[0]
    for passes in ([], [run]):
        values = qg.tree.flatten(qg.compile(graph, passes=passes, target="cpu")(*arrays))[0]
        for a, b in zip(values, expected, strict=True):
            np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-6, atol=1e-6)
    return result, result.format(origins=False)


def unchanged(run: Any, fn: Any, *args: Any) -> None:
    graph = qg.trace(fn, *args)
    assert run(graph) is graph


def test_fold_constants() -> None:
    graph, _ = after(FoldConstants(), lambda x: x + qg.exp(C) * 2, X)
    text = EliminateDeadCode()(graph).format(origins=False)
    assert text == (
        "graph f(x: f32[2,4]) -> f32[2,4]\n  %0: f32[2,4] = add(x, @C_exp_multiply)\n  return %0"
    )
    _, text = after(FoldConstants(), lambda x: x + qg.arange(4), X)
    assert "arange" not in text


def test_fold_constants_in_nested_loops() -> None:
    def fn(x: Any) -> Any:
        def inner(j: Any, h: Any) -> Any:
            return h + qg.square(qg.arange(4))

        return qg.fori_loop(0, 2, lambda i, h: qg.fori_loop(0, 2, inner, h), x)

    _, text = after(FoldConstants(), fn, X)
    assert "square" not in text
    assert "arange" not in text


def test_fold_constants_leaves_alone() -> None:
    w = mx.ones((64, 64))
    key = mx.random.key(0)
    unchanged(FoldConstants(), lambda x: x @ qg.zeros((4, 10**6)), X)
    unchanged(FoldConstants(), lambda x: qg.quantized_matmul(x, w), mx.ones((1, 64)))
    unchanged(FoldConstants(), lambda x: x + qg.dequantize(*mx.quantize(w))[0, :4], X)
    unchanged(FoldConstants(), lambda x: x + qg.random.normal((4,), key=key), X)
    unchanged(FoldConstants(), lambda x: x + qg.keep(C), X)
    unchanged(FoldConstants(), lambda x: x + qg.broadcast_to(C, (2, 4)), X)
    unchanged(FoldConstants(max_bytes=8), lambda x: x + qg.exp(C), X)


def test_simplify_broadcasts() -> None:
    """They go where the op broadcasts by itself, and stay where the result needs them."""
    one = mx.array(1.5)

    def fn(x: Any) -> Any:
        h = x * qg.broadcast_to(one, x.shape) + qg.broadcast_to(C, x.shape)
        h = qg.where(qg.broadcast_to(h[:1] > 0, h.shape), h, qg.broadcast_to(one, h.shape))
        y = qg.addmm(qg.broadcast_to(C, h.shape), h, qg.eye(4))
        return y, qg.exp(qg.broadcast_to(one, (3,)))

    graph, _ = after(Simplify(), fn, X)
    text = EliminateDeadCode()(graph).format(origins=False)
    assert text.count("broadcast_to") == 1
    assert "exp(%" in text


def test_simplify_reshapes() -> None:
    def fn(x: Any) -> Any:
        same = qg.squeeze(qg.reshape(x, (2, 1, 4)), 1)
        return same, qg.expand_dims(qg.reshape(x, (8,)), 0), qg.squeeze(qg.reshape(x, (8, 1)))

    graph, _ = after(Simplify(), fn, X)
    graph = EliminateDeadCode()(graph)
    assert [n.op for n in graph.nodes] == ["reshape", "reshape"]
    assert graph.outputs[0] is graph.inputs[0]


def test_common_subexpressions() -> None:
    _, text = after(
        EliminateCommonSubexpressions(), lambda x: (qg.exp(x) + 1.0, qg.exp(x) + 1.0), X
    )
    assert text == (
        "graph f(x: f32[2,4]) -> (f32[2,4], f32[2,4])\n"
        "  %0: f32[2,4] = exp(x)\n"
        "  %1: f32[2,4] = add(%0, 1)\n"
        "  return %1, %1"
    )


def test_common_subexpressions_in_a_body_are_its_own() -> None:
    def fn(x: Any) -> Any:
        y = qg.exp(x)
        return qg.fori_loop(0, 2, lambda i, h: qg.exp(h) * 0.1 + qg.exp(h) * 0.1, x) + y

    result, text = after(EliminateCommonSubexpressions(), fn, X)
    assert text.count("exp") == 2
    assert result.count() == 6


def test_common_subexpressions_leaves_alone() -> None:
    unchanged(EliminateCommonSubexpressions(), lambda x: (qg.sum(x, 0), qg.sum(x, 1)), X)
    unchanged(EliminateCommonSubexpressions(), lambda x: (qg.keep(x), qg.keep(x)), X)
    unchanged(EliminateCommonSubexpressions(), lambda x: (x + 1, x + 1.0), mx.array([1, 2]))
    unchanged(EliminateCommonSubexpressions(), lambda x: (qg.exp(x), qg.exp(x, stream="cpu")), X)
    unchanged(EliminateCommonSubexpressions(), lambda x: (x[0:1], x[1:2], x[:, 0], x[0]), X)
    unchanged(EliminateCommonSubexpressions(), lambda x, y: (x + 1, y + 2), X, X)


def test_dead_code() -> None:
    def fn(x: Any) -> Any:
        qg.exp(x)
        return qg.tanh(x)

    graph = qg.trace(fn, X, name="f")
    assert EliminateDeadCode()(graph) is graph  # tracing keeps only what is returned
    dead = Graph("f", graph.inputs, [*graph.nodes, qg.tanh(qg.Tensor(graph.inputs[0])).value.node],
                 graph.outputs, in_tree=graph.in_tree, out_tree=graph.out_tree)  # fmt: skip
    assert len(EliminateDeadCode()(dead).nodes) == 1


def test_dead_carried_values_and_operands() -> None:
    w = mx.ones((4,))

    def fn(x: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            used, unused, feeding = carry
            return used + feeding, unused * w, feeding * 0.5

        return qg.fori_loop(0, 3, body, (x, x * 2, x * 3))[0]

    result, text = after(EliminateDeadCode(), fn, X)
    (loop,) = [n for n in result.nodes if n.op == "fori_loop"]
    assert len(loop.args["carried"]) == 2
    assert loop.args["invariants"] == ()
    assert "multiply(x, 2)" not in text


def test_dead_stacked_values_nested() -> None:
    def fn(x: Any) -> Any:
        def inner(c: Any, s: Any) -> Any:
            return c + s[0], (c, s[1])

        def outer(c: Any, _: Any) -> Any:
            c, (kept, _unused) = qg.scan(inner, c, (qg.ones((3, 4)), qg.zeros((3, 4))))
            return c, kept

        return qg.scan(outer, x, length=2)[1]

    result, _ = after(EliminateDeadCode(), fn, X)
    inner = [n for _, n in result.walk() if n.op == "scan"][1]
    assert len(inner.args["xs"]) == 1
    assert len(inner.outputs) == 2


def test_dead_code_keeps_what_a_condition_reads() -> None:
    def fn(x: Any) -> Any:
        def body(carry: Any) -> Any:
            return carry[0] * 1.1, carry[1] + 1

        return qg.while_loop(lambda carry: carry[1] < 4, body, (x, mx.array(0)))[0]

    unchanged(EliminateDeadCode(), fn, X)
    after(EliminateDeadCode(), fn, X)


def test_streams_for_independent_products() -> None:
    a, b = mx.random.normal((512, 512)) / 22, mx.random.normal((512, 512)) / 22
    x = mx.random.normal((4, 512), key=mx.random.key(1))

    def fn(x: Any) -> Any:
        return qg.tanh(x @ a) + qg.tanh(x @ b)

    run = AssignStreams(TWO_CORES)
    graph = qg.trace(fn, x)
    result = run(graph)
    assert [n.stream for n in result.nodes if n.op == "matmul"] == [None, 1]
    assert [n.stream for n in result.nodes if n.op == "tanh"] == [None, None]
    program = qg.compile(graph, passes=[run], target="cpu")
    assert mx.allclose(program(x), fn(x), rtol=1e-4, atol=1e-4)

    def chain(x: Any) -> Any:
        return (x @ a) @ b

    unchanged(run, chain, x)
    unchanged(run, lambda x: (x @ x.T, x @ x.T), X)
    unchanged(AssignStreams(Target(mx.Device(mx.cpu, 0), "cpu", "x86_64", 1)), fn, x)
    unchanged(AssignStreams(Target(mx.Device(mx.cpu, 0), "cuda", "sm_90", 8)), fn, x)
    asked = qg.trace(lambda x: (qg.matmul(x, a, stream="cpu"), x @ b), x)
    assert [n.stream for n in run(asked).nodes if n.op == "matmul"] == ["cpu", None]


def test_products_in_shards() -> None:
    q = mx.quantize(mx.random.normal((1000, 1024), key=mx.random.key(0)))
    x = mx.random.normal((1, 1024), key=mx.random.key(1))

    def fn(x: Any) -> Any:
        return qg.fori_loop(0, 2, lambda i, h: h + qg.sum(qg.quantized_matmul(h, *q)) * 1e-3, x)

    run = AssignStreams(TWO_CORES)
    graph = qg.trace(fn, x, name="f")
    plan = qg.optimize(graph, passes=[run, HoistQuantize(), EliminateDeadCode()])
    products = [n for _, n in plan.graph.walk() if n.op == "quantized_matmul"]
    assert [n.output.shape for n in products] == [(1, 496), (1, 504)]
    assert [n.stream for n in products] == [None, 1]
    sliced = [n.stage for n in plan.graph.nodes if n.op == "getitem"]
    assert sliced == ["pack"] * 6
    results = [qg.compile(g, passes=[], target="cpu")(x) for g in (graph, plan.graph)]
    assert mx.array_equal(*results)
    assert [e.decision for e in plan.ledger() if e.made_by == "assign-streams"] == ["chosen"]
    small = mx.quantize(mx.random.normal((128, 64)))
    unchanged(run, lambda x: qg.quantized_matmul(x, *small), mx.ones((1, 64)))
    once = qg.trace(lambda x: qg.quantized_matmul(x, *q, stream="cpu"), x)
    assert run(once) is once


def test_balanced_products_stay_whole() -> None:
    gate, up = (mx.quantize(mx.random.normal((1024, 1024), key=mx.random.key(i))) for i in (0, 1))
    x = mx.ones((1, 1024))
    graph = qg.trace(lambda x: qg.quantized_matmul(x, *gate) * qg.quantized_matmul(x, *up), x)
    streams = [n.stream for n in AssignStreams(TWO_CORES)(graph).nodes
               if n.op == "quantized_matmul"]  # fmt: skip
    assert streams == [None, 1]


def test_streams_inside_a_loop() -> None:
    a, b = mx.random.normal((512, 512)) / 22, mx.random.normal((512, 512)) / 22
    x = mx.random.normal((4, 512), key=mx.random.key(1))

    def fn(x: Any) -> Any:
        return qg.fori_loop(0, 3, lambda i, h: qg.tanh(h @ a) + qg.tanh(h @ b), x)

    graph = AssignStreams(TWO_CORES)(qg.trace(fn, x))
    inside = [n.stream for _, n in graph.walk() if n.op == "matmul"]
    assert inside == [None, 1]
    assert mx.allclose(qg.compile(graph, passes=[])(x), fn(x), rtol=1e-4, atol=1e-4)


class Breaks:
    """A pass that breaks a promise."""

    name = "breaks"

    def __init__(self, change: Any) -> None:
        self.change = change

    def __call__(self, graph: Graph) -> Graph:
        result: Graph = self.change(graph)
        return result


def _wrong_type(graph: Graph) -> Graph:
    bad = graph.nodes[0].replace(types=[qg.TensorType((7,), mx.float32)])
    return graph.replace(nodes=[bad], outputs=bad.outputs)


def _unknown(graph: Graph) -> Graph:
    bad = Node("blend", graph.nodes[0].args, [graph.outputs[0].type])
    return graph.replace(nodes=[bad], outputs=bad.outputs)


def _early(graph: Graph) -> Graph:
    bad = graph.nodes[0].replace(stage="pack")
    return graph.replace(nodes=[bad], outputs=bad.outputs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_wrong_type, "MLX gives"),
        (_unknown, "blend"),
        (_early, "runs in the pack step"),
        (lambda g: g.replace(nodes=[]), "is an output but not in the graph"),
        (lambda g: g.replace(nodes=g.nodes * 2), "stands twice"),
        (lambda g: g.replace(inputs=[]), "no earlier node of this graph makes"),
    ],
)
def test_verify_names_what_a_pass_broke(change: Any, words: str) -> None:
    graph = qg.trace(lambda x: qg.tanh(x), X)
    with pytest.raises(VerifyError) as caught:
        qg.optimize(graph, passes=[Breaks(change)])
    assert words in str(caught.value)
    assert "breaks" in str(caught.value)
    qg.optimize(graph, passes=[Breaks(change)], check=False)


def test_verify_checks_bodies() -> None:
    graph = qg.trace(lambda x: qg.fori_loop(0, 2, lambda i, h: h + 1, x), X)
    loop = graph.nodes[-1]
    body = loop.bodies[0]
    wrong_inputs = body.replace(inputs=body.inputs[:1] + graph.inputs)
    cases = {
        "carries": loop.replace(bodies=(body.replace(outputs=body.inputs[:1]),)),
        "no earlier node": loop.replace(bodies=(wrong_inputs,)),
        "bodies": loop.replace(bodies=()),
    }
    for words, bad in cases.items():
        with pytest.raises(VerifyError, match=words):
            verify(graph.replace(nodes=[*graph.nodes[:-1], bad], outputs=bad.outputs))
