"""Rules that people write: patterns and replacements of any kind, on graphs of any form.

A rule that is true leaves the result as it is; one that is no rule has an error in words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

import qgraph as qg
from qgraph.errors import QGraphError
from qgraph.rewrite import ApplyRules, Rule
from tests.fuzz.surface import Surface

X = mx.array([[0.5, -1.5, 2.0], [0.0, -0.25, 3.0]])
Y = mx.array([[1.0, 2.0, -1.0], [-0.5, 0.125, 0.0]])

# Expressions are nested tuples: an op and its operands, "x" and "y", and numbers.
Expression = Any
UNARY = ["abs", "square", "negative", "floor", "sign", "maximum0"]
BINARY = ["add", "subtract", "multiply", "maximum", "minimum"]
NUMBERS = st.sampled_from([0, 1, 2, 0.5, -1, 0.0, -0.0, 0.1, 1.0])


def expressions(leaves: int) -> st.SearchStrategy[Expression]:
    return st.recursive(
        st.one_of(st.sampled_from(["x", "y"]), st.sampled_from(["x", "y"]), NUMBERS),
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(UNARY), inner),
            st.tuples(st.sampled_from(BINARY), inner, inner),
        ),
        max_leaves=leaves,
    )


def build(expression: Expression, given: dict[str, Any]) -> Any:
    if isinstance(expression, str):
        return given[expression]
    if not isinstance(expression, tuple):
        return expression
    name, *operands = expression
    made = [build(operand, given) for operand in operands]
    if all(isinstance(m, int | float) for m in made):
        made[0] = mx.array(float(made[0]))
    return qg.maximum(made[0], 0) if name == "maximum0" else getattr(qg, name)(*made)


def in_numpy(expression: Expression, given: dict[str, Any]) -> Any:
    if isinstance(expression, str):
        return given[expression]
    if not isinstance(expression, tuple):
        return np.float64(expression)
    name, *operands = expression
    made = [in_numpy(operand, given) for operand in operands]
    return np.maximum(made[0], 0) if name == "maximum0" else getattr(np, name)(*made)


def _of(names: str, body: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A function of parameters of these names."""
    made: Callable[..., Any] = eval(
        f"lambda {', '.join(names)}: body(dict({', '.join(f'{n}={n}' for n in names)}))",
        {"body": body},
    )
    return made


SAME: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "x + x": ("x", lambda g: g["x"] + g["x"], lambda g: g["x"] * 2),
    "2x": ("x", lambda g: g["x"] * 2, lambda g: g["x"] + g["x"]),
    "square": ("x", lambda g: qg.square(g["x"]), lambda g: g["x"] * g["x"]),
    "squared": ("x", lambda g: g["x"] * g["x"], lambda g: qg.square(g["x"])),
    "abs": ("x", lambda g: qg.abs(g["x"]), lambda g: qg.maximum(g["x"], -g["x"])),
    "order": ("xy", lambda g: qg.maximum(g["x"], g["y"]), lambda g: qg.maximum(g["y"], g["x"])),
    "difference": ("xy", lambda g: g["x"] - g["y"], lambda g: g["x"] + -g["y"]),
    "halves": ("x", lambda g: g["x"] * 0.5, lambda g: g["x"] - g["x"] * 0.5),
    "twice negative": ("x", lambda g: qg.negative(-g["x"]), lambda g: g["x"] * 1),
    "abs of abs": ("x", lambda g: qg.abs(qg.abs(g["x"])), lambda g: qg.abs(g["x"])),
}
CASES = st.tuples(
    expressions(8),
    st.sampled_from(["plain", "loop", "cond"]),
    st.one_of(
        st.lists(st.sampled_from(list(SAME)), min_size=1, max_size=3),
        st.tuples(
            st.sampled_from(["x", "xy", "yx", "", "xyz"]),
            st.one_of(expressions(4), st.sampled_from([None, "x", 3, ("split", "x")])),
            st.sampled_from(["x", "xy", "y", ""]),
            st.one_of(expressions(4), st.sampled_from([None, 3, "list"])),
            st.sampled_from(["exact", "tolerance 1e-3", "", "tolerance", "none", None, 3]),
            st.sampled_from([None, "no", 3, "raises"]),
        ),
    ),
)


def _model(expression: Expression, form: str) -> Callable[..., Any]:
    def model(x: Any, y: Any) -> Any:
        if form == "loop":
            turn = lambda i, h: build(expression, {"x": h, "y": y}) + x * 0  # noqa: E731
            return qg.fori_loop(0, 2, turn, x)
        if form == "cond":
            branch = lambda h: build(expression, {"x": h, "y": y}) + x * 0  # noqa: E731
            return qg.cond(qg.sum(x) > 0, branch, lambda h: h - y, x)
        return build(expression, {"x": x, "y": y}) + x * 0

    return model


def _expected(expression: Expression, form: str) -> Any:
    x, y = np.array(X, np.float64), np.array(Y, np.float64)
    for _ in range(2 if form == "loop" else 1):
        x = in_numpy(expression, {"x": x, "y": y}) + np.zeros_like(y)
    return x


def check(case: Any) -> None:
    mx.disable_compile()  # which would build a kernel for each expression
    try:
        _check(*case)
    finally:
        mx.enable_compile()


def _check(expression: Expression, form: str, rules: Any) -> None:
    true = isinstance(rules, list)
    try:
        if true:
            made = [Rule(n, _of(SAME[n][0], SAME[n][1]), _of(SAME[n][0], SAME[n][2]))
                    for n in rules]  # fmt: skip
        else:
            made = [_any_rule(*rules)]
        passes = [ApplyRules(tuple(made)), *qg.default_passes(qg.as_target("cpu"))]
        plan = qg.optimize(qg.trace(_model(expression, form), X, Y), target="cpu", passes=passes)
        plan.report()
        [str(entry) for entry in plan.ledger()]
        found = qg.compile(plan.graph, target="cpu", passes=[])(X, Y)
    except QGraphError:
        assert not true, "a rule that is true was refused"
        return
    assert found.shape == X.shape
    assert found.dtype == X.dtype
    if true:
        expected = _expected(expression, form)
        assert np.allclose(np.array(found), expected, rtol=1e-5, atol=1e-5), (found, expected)


def _names(expression: Expression) -> set[str]:
    """Variables that it reads."""
    if isinstance(expression, tuple):
        return set().union(*map(_names, expression[1:]))
    return {expression} & {"x", "y"} if isinstance(expression, str) else set()


def _any_rule(
    names: str, pattern: Any, others: str, replacement: Any, contract: Any, check: Any
) -> Rule:
    def of(expression: Any) -> Callable[[dict[str, Any]], Any]:
        if expression == "list":
            return lambda g: [*g.values()]
        if isinstance(expression, tuple) and expression[0] == "split":
            return lambda g: qg.split(g["x"], 2)
        return lambda g: build(expression, g) if _names(expression) <= set(g) else expression

    answers: dict[Any, Callable[[Any], Any]] = {"no": lambda m: "no", 3: lambda m: 3,
                                                "raises": lambda m: m["unknown"]}  # fmt: skip
    return Rule("any", _of(names, of(pattern)), _of(others, of(replacement)), answers.get(check),
                contract)  # fmt: skip


RULES = Surface(CASES, check, daily=60)
