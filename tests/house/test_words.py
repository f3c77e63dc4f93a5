"""What people write by mistake gets a sentence that says what to do, never a traceback of ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from qgraph.errors import ControlFlowError, InputError, QGraphError
from qgraph.passes import Simplify
from qgraph.rewrite.rules import Rule

W = mx.random.normal((64, 64), key=mx.random.key(0)) / 8
X = mx.random.normal((2, 64), key=mx.random.key(1))
S = qg.spec((2, 64))


def f(x: Any) -> Any:
    return qg.tanh(x @ W)


class OddPass:
    """A pass that returns something else, or promises what nobody knows."""

    name = "odd"

    def __init__(self, result: Any = None, contract: Any = "exact") -> None:
        self.result, self.contract = result, contract

    def __call__(self, graph: qg.Graph) -> Any:
        return graph if self.result is graph else self.result


GRAPH = qg.trace(f, S)
MISTAKES: dict[str, tuple[Any, str]] = {
    "nn.relu": (lambda: qg.trace(lambda x: nn.relu(x), S), r"qg.call\(nn.relu, x\)"),
    "a module": (lambda: qg.trace(lambda x: nn.Linear(64, 64)(x), S), r"qg.call\(module, x\)"),
    "a function below a dot": (
        lambda: qg.trace(lambda x: mx.fast.rms_norm(x, None, 1e-5), S), "qg.fast.rms_norm",
    ),
    "mx.stack": (lambda: qg.trace(lambda x: mx.stack([x, x]), S), "call qg.stack"),
    "mx.einsum": (lambda: qg.trace(lambda x: mx.einsum("ij->ji", x), S), "qg.einsum"),
    "mx.vjp": (lambda: qg.trace(lambda x: mx.vjp(qg.tanh, [x], [x]), S), "qg.call.mx.vjp"),
    "mx.vmap": (lambda: qg.trace(lambda x: mx.vmap(qg.tanh)(x), S), "qg.from_mlx"),
    "mx.grad": (lambda: qg.trace(lambda x: mx.grad(qg.sum)(x), S), "transformation"),
    "mx.compile": (lambda: qg.trace(lambda x: mx.compile(qg.tanh)(x), S), "mx.compile made"),
    "quantize=4": (lambda: qg.compile(f, S, quantize=4), r"Quantize\(bits=4\)$"),
    "quantize={}": (lambda: qg.compile(f, S, quantize={"bits": 4}), "quantize={'bits': 4}"),
    "a plan compiled": (lambda: qg.compile(qg.optimize(GRAPH)), "of type Plan, and no function"),
    "a number compiled": (lambda: qg.compile(3, S), "of type int, and no function"),
    "a graph traced": (lambda: qg.trace(GRAPH, S), "of type Graph, and no function"),
    "a graph with specs": (lambda: qg.compile(GRAPH, S), "has its types"),
    "a function optimized": (lambda: qg.optimize(f), "takes a graph, not a function"),
    "a plan optimized": (lambda: qg.optimize(qg.optimize(GRAPH)), "not a Plan"),
    "a graph for jit": (lambda: qg.jit(GRAPH), "jit takes a function"),
    "a missing spec": (lambda: qg.trace(f), "missing a required argument: 'x'"),
    "a spec too many": (lambda: qg.trace(f, S, S), "too many positional arguments"),
    "spec of a name": (lambda: qg.spec(2, "float32"), "qg.float16"),
    "spec of NumPy": (lambda: qg.spec(2, np.float32), "no dtype of MLX"),
    "spec of a text": (lambda: qg.spec("2,3"), "'2,3' is no shape"),
    "spec of fractions": (lambda: qg.spec((2.5, 3)), "no shape"),
    "spec below zero": (lambda: qg.spec((-1, 3)), "no shape"),
    "spec beyond": (lambda: qg.spec((2**40,)), "no shape"),
    "malformed JSON": (lambda: qg.Graph.from_json("{"), "not a graph in JSON"),
    "a bad target": (lambda: qg.compile(f, S, target="tpu"), "'cpu', 'gpu' or an mx.Device"),
    "a number for a target": (lambda: qg.compile(f, S, target=3), "target=3"),
    "a pass that returns a tensor": (
        lambda: qg.compile(f, S, passes=[OddPass(qg.tensor(X))]), "the pass odd returned a Tensor",
    ),
    "a pass that returns nothing": (
        lambda: qg.compile(f, S, passes=[OddPass()]), "the pass odd returned a NoneType",
    ),
    "a pass's contract": (lambda: qg.compile(f, S, passes=[OddPass(contract="foo")]), "'foo'"),
    "a pass's class": (lambda: qg.compile(f, S, passes=[Simplify]), r"Simplify\(\) is one"),
    "a function for a pass": (lambda: qg.compile(f, S, passes=[lambda g: g]), "is no pass"),
    "passes by name": (lambda: qg.compile(f, S, passes="simplify"), "a list of passes"),
    "a rule's contract": (
        lambda: Rule("square", lambda x: x * x, lambda x: qg.square(x), contract="foo"), "'foo'",
    ),
    "a pattern of no op": (lambda: Rule("r", lambda x: 3, lambda x: x).tree, "result of an op"),
    "parameters=[3]": (lambda: qg.compile(f, S, parameters=[3]), r"parameters=\[3\]"),
    "parameters=[-1]": (lambda: qg.compile(f, S, parameters=[-1]), "there are 0 to 0"),
    "parameters=0": (lambda: qg.compile(f, S, parameters=0), "as a list"),
    "parameters by name": (lambda: qg.compile(f, S, parameters=["x"]), "positions"),
    "parameters of jit": (lambda: qg.jit(f, parameters=[3])(X), r"parameters=\[3\]"),
    "where=3": (lambda: qg.Quantize(4, where=3), "where=3"),
    "where=[...]": (lambda: qg.Quantize(4, where=["*.weight"]), "give a glob"),
    "a rule's answer": (lambda: qg.Quantize(4, where={"*": 3}), "a rule answered 3"),
    "a rule's name": (lambda: qg.Quantize(4, where={3: True}), "from a glob"),
    "embeddings=3": (lambda: qg.Quantize(4, embeddings=3), "answered 3"),
    "bits as a text": (lambda: qg.Quantize("4"), "bits='4'"),
    "bits as a float": (lambda: qg.Quantize(4.0), "bits=4.0"),
    "a mode of none": (lambda: qg.Quantize(4, mode=["affine"]), "is not a mode"),
    "a budget in words": (lambda: qg.compile(f, S, budget="1GB"), "budget='1GB'"),
    "check of another shape": (lambda: qg.optimize(GRAPH).check(X[:1]), r"x is f32\[1,64\]"),
    "check of nothing": (lambda: qg.optimize(GRAPH).check(), "it takes 1 positional argument"),
    "a bound of a loop": (lambda: qg.fori_loop(0, "2", lambda i, h: h, X), "a bound is '2'"),
    "half a turn": (lambda: qg.fori_loop(0, 2.5, lambda i, h: h, X), "a bound is 2.5"),
    "a condition of many": (lambda: qg.cond(X > 0, lambda: 1, lambda: 2), "one bool without axes"),
    "a loop without end": (lambda: qg.while_loop(lambda h: h, lambda h: h, X), "one bool"),
    "nothing there": (lambda: qg.load("/nowhere"), "there is no folder /nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_has_a_sentence(name: str) -> None:
    wrong, words = MISTAKES[name]
    with pytest.raises(QGraphError, match=words):
        wrong()


def both(a: Any, b: Any) -> Any:
    return a["x"] + b


CALLS: dict[str, tuple[Any, str]] = {
    "another form": (lambda p: p(X, X), "a"),
    "a missing argument": (lambda p: p({"x": X}), "it takes 2 positional arguments, 1 was given"),
    "a missing key": (lambda p: p({}, X), "a.x is missing"),
    "a number for an array": (lambda p: p({"x": X}, 1.0), "b is 1.0"),
    "another type": (lambda p: p({"x": X}, X[:1]), r"b is f32\[1,64\], not f32\[2,64\]"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_another_form_says_which_argument(name: str) -> None:
    call, words = CALLS[name]
    with pytest.raises(InputError, match=words):
        call(qg.compile(both, {"x": S}, S))


def test_prepare_takes_numpy() -> None:
    program = qg.compile(lambda w, x: qg.quantized_matmul(x, w), W, S, parameters=[0])
    ours = program(program.prepare(np.array(W)), X)
    assert mx.array_equal(ours, program(program.prepare(W), X))


@pytest.mark.parametrize("what", ["program", "graph", "plan", "dump"])
def test_a_path_that_cannot_be_written(what: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    program = qg.compile(f, S)
    save = {
        "program": lambda: program.save(file / "folder"),
        "graph": lambda: program.plan.graph.save(file / "graph.json"),
        "plan": lambda: program.plan.save(file / "plan.html"),
        "dump": lambda: program.plan.dump(file / "folder"),
    }[what]
    with pytest.raises(QGraphError, match=f"{file}.* cannot be written: "):
        save()
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_activations_are_those_of_mlx_nn(name: str, dtype: mx.Dtype) -> None:
    x = (4 * X).astype(dtype)
    expected = getattr(nn, name)(x)
    for actual in (getattr(qg, name)(x), qg.compile(getattr(qg, name), x, target="cpu")(x)):
        assert actual.dtype == dtype
        assert mx.allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_dtypes_and_what_is_not_there() -> None:
    assert (qg.float16, qg.bool_, qg.uint8) == (mx.float16, mx.bool_, mx.uint8)
    assert qg.spec(2, qg.bfloat16).type.dtype == mx.bfloat16
    with pytest.raises(AttributeError, match="no attribute 'vmap': a transformation"):
        _ = qg.vmap
    with pytest.raises(AttributeError, match="its ops are those"):
        _ = qg.attention_of_mine
    with pytest.raises(AttributeError, match="did you mean 'tanh'"):
        _ = qg.tanhh
    assert not hasattr(qg, "__path_of_nothing__")


def test_conditions_of_arrays_are_bools_in_both() -> None:
    with pytest.raises(ControlFlowError):
        qg.cond(mx.array(1), lambda x: x, lambda x: x, X)
    with pytest.raises(ControlFlowError):
        qg.trace(lambda x: qg.cond(mx.array(1), lambda x: x, lambda x: x, x), S)


def test_a_captured_array_that_changes_is_as_it_was() -> None:
    """For all shapes alike: a program holds the elements of its first trace."""
    w = mx.array(W)
    fixed = qg.compile(lambda x: x @ w, S, target="cpu")
    late = qg.jit(lambda x: x @ w, target="cpu")
    before = X @ W
    late(X)
    w[0] = 100.0
    w *= 2
    for program in (fixed, late):
        assert mx.allclose(program(X), before, rtol=1e-5, atol=1e-5)
    assert mx.allclose(late(X[:1]), before[:1], rtol=1e-4, atol=1e-5)
