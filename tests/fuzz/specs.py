"""Specs and settings: texts and values of any kind where a type or a format is asked for.

What is taken prints as what was given; what is not has an error in words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

import qgraph as qg
from qgraph.cli.sources import parse_spec
from qgraph.errors import QGraphError
from qgraph.inspection.serialize import parse_type
from qgraph.types import DTYPES, Spec, TensorType
from tests.fuzz.surface import Surface, in_words

Case = tuple[str, Any]

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 130),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.sampled_from([mx.float16, mx.int8, mx.array(2), np.int64(3), np.float32(2.5), ..., object]),
    st.lists(st.integers(-2, 2**33), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
TYPES = st.builds(
    TensorType,
    st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple),
    st.sampled_from(list(DTYPES.values())),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    TYPES.map(str),
    st.tuples(TYPES.map(str), st.integers(0, 8), st.text(max_size=2)).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + 1 :]
    ),
    st.text("fiub0123468[], :-+_", max_size=14),
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.one_of(st.sampled_from([2, 3, 4, 5, 6, 8]), ANYTHING),
        "group_size": st.one_of(st.sampled_from([16, 32, 64, 128]), ANYTHING),
        "mode": st.one_of(st.sampled_from(["affine", "mxfp4", "mxfp8", "nvfp4"]), ANYTHING),
        "where": st.one_of(st.sampled_from(["*", "w", "[", "", "w*"]), ANYTHING),
    },
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "target": st.one_of(st.sampled_from(["cpu", mx.cpu]), ANYTHING),
        "quantize": ANYTHING,
        "passes": st.one_of(st.just([]), ANYTHING),
        "budget": ANYTHING,
        "tune": st.one_of(st.sampled_from(["table", "off"]), ANYTHING),
        "parameters": st.one_of(st.just([0]), ANYTHING),
        "donate": ANYTHING,
    },
)


def _spec(case: Any) -> None:
    shape, dtype = case
    made = qg.spec(shape, dtype)
    assert all(type(n) is int and 0 <= n < 2**31 for n in made.type.shape), made
    assert parse_type(str(made.type)) == made.type
    size = made.type.nbytes
    if size < 2**20:
        assert mx.zeros(made.type.shape, made.type.dtype).nbytes == size


def _parsed(text: Any) -> None:
    made = parse_spec(text)
    assert isinstance(made, Spec)
    assert parse_spec(str(made.type)).type == made.type
    again = f"{made.name}: {made.type}" if made.name else str(made.type)
    assert parse_spec(again) == made


def _type(text: Any) -> None:
    assert str(parse_type(str(parse_type(text)))) == str(parse_type(text))


W = mx.ones((64, 128))
X = mx.ones((1, 128))


def _quantize(settings: Any) -> None:
    config = qg.Quantize(**settings)
    program = qg.compile(lambda x: x @ W.T, X, quantize=config, target="cpu")
    assert mx.allclose(program(X), X @ W.T, rtol=0.1)


def _compile(options: Any) -> None:
    program = qg.compile(lambda x: x * 2, X, **options)
    given = [X] if options.get("donate") == [0] else X
    if program.executables[0].parameters:
        given = program.prepare(X)
    assert mx.array_equal(program(given), X * 2)


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "spec": (
        st.tuples(
            st.one_of(ANYTHING, st.lists(st.integers(0, 9), max_size=3), st.lists(ANYTHING)),
            st.one_of(st.sampled_from(list(DTYPES.values())), st.sampled_from(list(DTYPES)),
                      st.sampled_from(["float32", "int8"]), ANYTHING),
        ),
        _spec,
    ),
    "parse_spec": (TEXTS, _parsed),
    "parse_type": (TEXTS, _type),
    "Quantize": (SETTINGS, _quantize),
    "compile": (OPTIONS, _compile),
}  # fmt: skip


def check(case: Case) -> None:
    kind, given = case
    try:
        KINDS[kind][1](given)
    except QGraphError as error:
        in_words(error)
    except ValueError:
        if kind != "parse_type":  # which only readers of files call
            raise


SPECS = Surface(
    st.one_of(*(st.tuples(st.just(kind), cases) for kind, (cases, _) in KINDS.items())),
    check,
    daily=150,
)
