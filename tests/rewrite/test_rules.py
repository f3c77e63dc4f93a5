"""Rules: matching, refusing, nearest misses, contracts; and the `simplify` pass made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.errors import ContractError, QGraphError
from qgraph.passes import EliminateDeadCode, Simplify
from qgraph.rewrite.rules import ApplyRules, Rule, op
from tests.support.arrays import to_numpy

X = mx.random.normal((2, 4), key=mx.random.key(0))
SQUARE = Rule("square", lambda x: x * x, lambda x: qg.square(x))


def plan_of(fn: Any, *rules: Rule, args: Any = (X,)) -> qg.Plan:
    graph = qg.trace(fn, *args, name="f")
    return qg.optimize(graph, target="cpu", passes=[ApplyRules(rules), EliminateDeadCode()])


def ops(graph: qg.Graph) -> list[str]:
    return [n.op for _, n in graph.walk() if n.op != "constant"]


def lines(plan: qg.Plan) -> list[str]:
    return [f"{e.decision} {e.what}: {e.reason}" for e in plan.ledger()]


def run(plan: qg.Plan, *args: mx.array) -> Any:
    return to_numpy(qg.compile(plan.graph, passes=[], target="cpu")(*args))


def test_a_variable_used_twice_is_one_tensor() -> None:
    plan = plan_of(lambda x: x * x + x * qg.exp(x), SQUARE)
    assert [n.op for n in plan.graph.nodes if n.op in ("square", "multiply")] == [
        "square",
        "multiply",
    ]
    wanted = np.square(to_numpy(X)) + to_numpy(X) * np.exp(to_numpy(X))
    np.testing.assert_allclose(run(plan, X), wanted, rtol=1e-6)


def test_in_nested_loops() -> None:
    def fn(x: Any) -> Any:
        return qg.fori_loop(
            0, 2, lambda i, h: qg.fori_loop(0, 2, lambda j, g: g * g * 0.5, h) + x, x
        )

    plan = plan_of(fn, SQUARE)
    assert ops(plan.graph).count("square") == 1
    np.testing.assert_allclose(run(plan, X), to_numpy(fn(X)), rtol=1e-5)


@pytest.mark.parametrize("fn", [lambda x: x * 3, lambda x: 3 * x])
def test_literals_and_operands_either_way_round(fn: Callable[[Any], Any]) -> None:
    triple = Rule("triple", lambda x: x * 3, lambda x: x + x + x)
    assert ops(plan_of(fn, triple).graph) == ["add", "add"]
    assert ops(plan_of(lambda x: x * 4, triple).graph) == ["multiply"]
    half = Rule("half", lambda x: x / 2, lambda x: x * 0.5)
    assert ops(plan_of(lambda x: 2 / x, half).graph) == ["divide"]


def test_static_settings_are_variables() -> None:
    rule = Rule(
        "sum-of-sum",
        lambda x, axis, keepdims: qg.sum(-x, axis, keepdims),
        lambda x, axis, keepdims: -qg.sum(x, axis, keepdims),
    )
    plan = plan_of(lambda x: qg.sum(-x, axis=1), rule)
    assert ops(plan.graph) == ["sum", "negative"]
    np.testing.assert_allclose(run(plan, X), -to_numpy(X).sum(1), rtol=1e-5)


def test_quantized_ops_and_tuples_of_operands() -> None:
    w, s, b = mx.quantize(mx.random.normal((32, 64)), group_size=64, bits=4)
    rule = Rule(
        "dense",
        lambda w, s, b, g, n: qg.transpose(op("dequantize", w, s, b, g, n)),
        lambda w, s, b, g, n: qg.swapaxes(qg.dequantize(w, s, b, g, n), 0, 1),
    )
    plan = plan_of(lambda x: x @ qg.dequantize(w, s, b, 64, 4).T, rule, args=(mx.ones((2, 64)),))
    assert ops(plan.graph) == ["dequantize", "swapaxes", "matmul"]
    pair = Rule("pair", lambda a, b: qg.concatenate([a, b], 0), lambda a, b: qg.stack([a, b])[0])
    with pytest.raises(QGraphError, match=r"the rule pair replaces f32\[4,4\] by f32\[2,4\]"):
        plan_of(lambda x: qg.concatenate([x, x]), pair)


def test_check_refuses_in_words() -> None:
    rule = Rule("square", SQUARE.pattern, SQUARE.replacement, lambda m: f"{m['x'].ndim} axes")
    plan = plan_of(lambda x: x * x, rule)
    assert plan.graph is plan.source
    assert lines(plan) == ["refused multiply of f32[2,4]: rule square: 2 axes"]


def test_the_nearest_miss_is_kept() -> None:
    rule = Rule("deep", lambda x: qg.exp(qg.log(qg.abs(x))), lambda x: qg.abs(x))
    plan = plan_of(lambda x: qg.exp(x) + qg.exp(qg.log(qg.sin(x))), rule)
    assert lines(plan) == [
        "refused exp of f32[2,4]: rule deep: nearest miss: sin stands where the pattern has abs"
    ]
    plan = plan_of(lambda x: qg.exp(x) + qg.exp(qg.log(qg.abs(x))), rule)
    assert lines(plan) == ["rewritten exp of f32[2,4]: rule deep"]


def test_what_a_pattern_may_be() -> None:
    with pytest.raises(TypeError, match="a pattern gives the result of an op, not x"):
        plan_of(lambda x: x * x, Rule("nothing", lambda x: x, lambda x: x))


def test_a_stream_of_the_users_is_left_alone() -> None:
    plan = plan_of(lambda x: qg.multiply(x, x, stream="cpu"), SQUARE)
    assert plan.graph is plan.source


def test_the_contract_of_a_pass_is_its_loosest_rule() -> None:
    rules = [Rule(c, SQUARE.pattern, SQUARE.replacement, None, c) for c in
             ("exact", "tolerance 1e-3", "dtype-preserving", "tolerance 1e-5")]  # fmt: skip
    assert ApplyRules(()).contract == "exact"
    assert ApplyRules(tuple(rules)).contract == "tolerance 1e-3"
    assert ApplyRules((rules[0], rules[2])).contract == "dtype-preserving"


def test_check_names_pass_rule_and_line() -> None:
    wrong = Rule("wrong", lambda x: qg.sigmoid(x), lambda x: qg.sigmoid(x + 1e-2))
    graph = qg.trace(lambda x: qg.exp(qg.sigmoid(x)), X)
    with pytest.raises(ContractError) as caught:
        qg.optimize(graph, passes=[ApplyRules((SQUARE, wrong)), *qg.default_passes()]).check(X)
    assert "the pass apply-rules (by rule wrong) changes what sigmoid gives" in str(caught.value)
    loose = Rule("loose", wrong.pattern, lambda x: qg.sigmoid(x) * 1.001, None, "tolerance 1e-2")
    qg.optimize(graph, passes=[ApplyRules((loose,))]).check(X)


def test_an_unknown_contract_is_an_error() -> None:
    with pytest.raises(QGraphError, match="contract 'roughly'"):
        Rule("r", lambda x: qg.sigmoid(x), lambda x: qg.sigmoid(x) * 1.001, None, "roughly")


SIMPLER: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "times one": (lambda x: x * 1 + 1 * x, ["add"]),
    "over one": (lambda x: x / 1, []),
    "minus zero": (lambda x: x - 0, []),
    "same cast": (lambda x: x.astype(mx.float32), []),
    "identity transpose": (lambda x: qg.transpose(x, (0, -1)), []),
    "two transposes": (lambda x: x.T.T, []),
    "three transposes": (lambda x: x.T.T.T, ["transpose"]),
    "reshape there and back": (lambda x: x.reshape(8).reshape(2, 4), []),
    "reshapes": (lambda x: x.reshape(8).reshape(4, 1, 2).reshape(4, -1), ["reshape"]),
    "broadcast": (lambda x: qg.broadcast_to(x, (2, 4)), []),
    "negatives": (lambda x: qg.negative(-x), []),
    "kept: plus zero": (lambda x: x + 0, ["add"]),
    "kept: casts that round": (
        lambda x: x.astype(mx.float16).astype(mx.float32),
        ["astype", "astype"],
    ),
    "kept: one that broadcasts": (lambda x: x * mx.ones((3, 1, 1)), ["multiply"]),
    "kept: times two": (lambda x: x * 2, ["multiply"]),
}


@pytest.mark.parametrize("name", SIMPLER)
def test_simplify(name: str) -> None:
    fn, wanted = SIMPLER[name]
    graph = qg.trace(fn, X)
    plan = qg.optimize(graph, target="cpu", passes=[Simplify(), EliminateDeadCode()])
    assert ops(plan.graph) == wanted
    assert np.array_equal(run(plan, X), to_numpy(fn(X)))
    plan.check(X)
    assert plan.ledger() == []


def test_simplify_of_three_axes() -> None:
    x = mx.random.normal((2, 3, 4), key=mx.random.key(1))

    def fn(x: Any) -> Any:
        return qg.transpose(qg.transpose(x, (1, 2, 0)), (1, 2, 0))

    plan = qg.optimize(qg.trace(fn, x), passes=[Simplify(), EliminateDeadCode()])
    assert ops(plan.graph) == ["transpose"]
    assert np.array_equal(run(plan, x), to_numpy(x).transpose(1, 2, 0).transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("number", [0.1, -1e-3, 3, 2.5])
def test_a_number_is_what_its_dtype_makes_of_it(number: float, dtype: mx.Dtype) -> None:
    rule = Rule("scaled", lambda x: x * number, lambda x: qg.negative(x))
    plan = plan_of(lambda x: qg.exp(x) * number, rule, args=(X.astype(dtype),))
    assert ops(plan.graph) == ["exp", "negative"]
    near = plan_of(lambda x: qg.exp(x) * (number * 1.25), rule, args=(X.astype(dtype),))
    assert ops(near.graph) == ["exp", "multiply"]


@pytest.mark.parametrize("number", [0.5, 2**40])
def test_an_integer_is_no_other_number(number: float) -> None:
    rule = Rule("plus", lambda x: x + number, lambda x: x)
    for other in (0, 1, 2):
        plan = plan_of(lambda x, n=other: qg.abs(x) + n, rule, args=(mx.array([1, 2]),))
        assert ops(plan.graph) == ["abs", "add"]


def test_settings_of_an_import_are_rounded_as_mlx_keeps_them() -> None:
    weight = mx.ones(4)
    rule = Rule("norm", lambda x, w: qg.fast.rms_norm(x, w, 1e-5), lambda x, w: qg.negative(x) * w)
    graph = qg.from_mlx(lambda x: mx.fast.rms_norm(x, weight, 1e-5), X)
    graph = qg.optimize(graph, target="cpu").graph
    assert "fast.rms_norm" in ops(graph)
    assert "negative" in ops(ApplyRules((rule,))(graph))


def test_a_variable_used_twice_is_one_number() -> None:
    """In a graph as it is written, each 0.1 is a constant of its own."""
    rule = Rule("both", lambda x, y, a: x * a + y * a, lambda x, y, a: (x + y) * a)
    plan = plan_of(lambda x: qg.exp(x) * 0.1 + qg.abs(x) * 0.1, rule)
    assert ops(plan.graph) == ["exp", "abs", "add", "multiply"]
    near = plan_of(lambda x: qg.exp(x) * 0.1 + qg.abs(x) * 0.2, rule)
    assert ops(near.graph).count("multiply") == 2
