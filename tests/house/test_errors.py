"""Each misuse gets its own words, the user's line, and what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import errors
from qgraph.origin import NOWHERE, Origin

X = qg.spec((2, 3))
LEAKED: list[Any] = []


def as_condition(x: Any) -> Any:
    return x * 2 if x.sum() > 0 else x


def in_a_loop(x: Any) -> Any:
    return sum(row for row in x)


def with_numpy(x: Any) -> Any:
    return np.tanh(x)


def with_mlx(x: Any) -> Any:
    return mx.tanh(x)


def with_mlx_of_arrays_only(x: Any) -> Any:
    y = x + 1
    return mx.matmul(mx.ones((4, 2)), y)


def in_an_array(x: Any) -> Any:
    return mx.array([x, x])


def in_a_format(x: Any) -> Any:
    return f"{x:.2f}"


def with_math(x: Any) -> Any:
    return math.sqrt(x.sum())


def as_an_index(x: Any) -> Any:
    return [1, 2, 3][x.sum().astype(mx.int32)]


def as_an_int(x: Any) -> Any:
    return x * int(x.sum())


def as_an_item(x: Any) -> Any:
    return x * x.sum().item()


def that_do_not_fit(x: Any) -> Any:
    return x @ x


def with_a_wrong_name(x: Any) -> Any:
    return qg.softmax(x, axes=-1)


def with_an_unknown_method(x: Any) -> Any:
    return x.numpy().sum()


def of_a_wrong_kind(x: Any) -> Any:
    return {1, 2}


def random_without_key(x: Any) -> Any:
    return x + qg.random.normal((2, 3))


def a_carry_that_grows(x: Any) -> Any:
    return qg.fori_loop(0, 3, lambda i, h: qg.concatenate([h, h]), x)


def biases_without_scales(x: Any) -> Any:
    return qg.quantized_matmul(x, mx.ones((4, 3)), biases=mx.ones((4, 1)))


def a_group_that_does_not_divide(x: Any) -> Any:
    return qg.quantized_matmul(x, mx.ones((4, 3)))


MISUSES: list[tuple[Callable[..., Any], type[Exception], str, str]] = [
    (as_condition, errors.TraceError, "a Python condition needs the elements", "qg.where"),
    (in_a_loop, errors.TraceError, "iteration needs the elements", "qg.scan"),
    (with_numpy, errors.TraceError, "a NumPy function needs the elements", "in qgraph"),
    (with_mlx, errors.TraceError, "an mlx.core function", "in qgraph"),
    (with_mlx_of_arrays_only, errors.TraceError, "mlx.core's matmul was called", "qg.matmul"),
    (in_an_array, errors.TraceError, "an mx.array cannot be made", "qg.stack"),
    (in_a_format, errors.TraceError, "the format '.2f' needs the elements", "after the program"),
    (with_math, errors.TraceError, "float() needs the elements", "keep it a tensor"),
    (as_an_index, errors.TraceError, "a Python index needs the elements", "qg.take"),
    (as_an_int, errors.TraceError, "int() needs the elements", "keep it a tensor"),
    (as_an_item, errors.TraceError, ".item() needs the elements", "keep it a tensor"),
    (that_do_not_fit, errors.ShapeError, "matmul cannot take f32[2,3], f32[2,3]", "matmul(a, b"),
    (with_a_wrong_name, errors.ShapeError, "softmax: ", "softmax(a, /, axis=None"),
    (with_an_unknown_method, errors.TraceError, "depends on x", "return it"),
    (of_a_wrong_kind, errors.TraceError, "returned a set", "lists, tuples and dicts"),
    (random_without_key, errors.TraceError, "without a key", "pass key="),
    (a_carry_that_grows, errors.ControlFlowError, "f32[4,3]", ""),
    (biases_without_scales, errors.QuantizationError, "biases", ""),
    (a_group_that_does_not_divide, errors.QuantizationError, "64", ""),
]


@pytest.mark.parametrize(
    ("fn", "kind", "what", "hint"), MISUSES, ids=[row[0].__name__ for row in MISUSES]
)
def test_misuse(
    fn: Callable[..., Any], kind: type[errors.QGraphError], what: str, hint: str
) -> None:
    with pytest.raises(kind) as caught:
        qg.trace(fn, X)
    error = caught.value
    assert what in error.what
    assert hint in error.hint
    lines, start = inspect.getsourcelines(fn)
    if fn is not of_a_wrong_kind:  # that one is about what came out, not about a line
        assert error.origin.file == __file__
        assert start < error.origin.line < start + len(lines)
        text = str(error).splitlines()
        assert text[1].strip() == f"at {__file__}:{error.origin.line}"
        assert text[2].strip() == lines[error.origin.line - start].strip()


def test_leak_out_of_a_trace() -> None:
    qg.trace(lambda x: LEAKED.append(x + 1) or x, X)
    with pytest.raises(errors.TraceError, match="another trace") as caught:
        qg.trace(lambda y: y + LEAKED[0], X)
    assert "pass it in as an argument" in caught.value.hint
    assert "LEAKED[0]" in caught.value.origin.source()
    with pytest.raises(errors.TraceError, match="depends on x"):
        LEAKED[0].eval()


def test_leak_out_of_a_loop_body() -> None:
    kept: list[Any] = []

    def body(i: Any, h: Any) -> Any:
        kept.append(h * 2)
        return h + 1

    def fn(x: Any) -> Any:
        y = qg.fori_loop(0, 3, body, x)
        return y + kept[-1]

    with pytest.raises(errors.TraceError, match="loop body") as caught:
        qg.trace(fn, X)
    assert caught.value.origin.source() == "return y + kept[-1]"


def test_a_tensor_is_no_argument_of_a_program() -> None:
    program = qg.compile(lambda x: x * 2, X)
    with pytest.raises(errors.TraceError, match="called on a symbolic tensor"):
        qg.trace(lambda x: program(x), X)
    with pytest.raises(errors.InputError, match=r"x is f32\[5\], not f32\[2,3\]"):
        program(mx.ones(5))
    with pytest.raises(errors.InputError, match="takes arrays, not set"):
        program({1})


def test_the_words_of_an_error() -> None:
    error = qg.QGraphError("what", hint="do this", origin=Origin(__file__, 1))
    assert str(error).splitlines() == [
        "what",
        f"  at {__file__}:1",
        '    """Each misuse gets its own words, the user\'s line, and what to do."""',
        "  do this",
    ]
    assert str(qg.QGraphError("what", origin=NOWHERE)) == "what"
    labelled = qg.QGraphError("what", origin=Origin(label="layers.0.weight"))
    assert str(labelled).splitlines() == ["what", "  at layers.0.weight"]


def named() -> list[type[errors.QGraphError]]:
    return [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.QGraphError)
    ]


def test_every_error_is_a_qgraph_error_and_says_when_it_comes() -> None:
    for kind in named():
        assert inspect.getdoc(kind)
        assert issubclass(kind, qg.QGraphError)


def test_the_page_lists_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    for kind in named():
        assert f"`{kind.__name__}`" in page
