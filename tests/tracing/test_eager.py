"""A function is its own reference: on arrays alone, outside of a trace, everything runs at once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg
from qgraph.errors import ControlFlowError

X = mx.random.normal((2, 4), key=mx.random.key(0))


def same(eager: Any, compiled: Any) -> None:
    """Of one form, and the same numbers."""
    ours, form = qg.tree.flatten(eager)
    theirs, other = qg.tree.flatten(compiled)
    assert form == other
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is mx.array
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-6)


LAYER = nn.Linear(4, 4)
FUNCTIONS: dict[str, Any] = {
    "call": lambda x: qg.call(LAYER, x),
    "call with keywords": lambda x: qg.call(lambda a, *, b: {"y": [a + b]}, x, b=x),
    "meshgrid": lambda x: qg.meshgrid(x[0], x[1]),
    "split": lambda x: qg.split(x, 2),
    "quantize": lambda x: qg.quantize(qg.broadcast_to(x[:, :1], (2, 64))),
    "divmod": lambda x: qg.divmod(x, 2.0),
    "broadcast_arrays": lambda x: qg.broadcast_arrays(x, x[0]),
    "svd": lambda x: qg.linalg.svd(x, stream="cpu")[1],
    "unique": lambda x: qg.unique(x.flatten(), 8, return_counts=True),
    "scan": lambda x: qg.scan(lambda c, s: (c + s, {"y": c * 2}), x[0], x),
    "a scan backwards": lambda x: qg.scan(lambda c, s: (c + s, c), x[0], x, reverse=True),
    "a scan of no turns": lambda x: qg.scan(lambda c, s: (c + s, {"y": c * 2}), x[0], x[:0]),
    "of a length of none": lambda x: qg.scan(lambda c, s: (c, c.sum()), x, length=0),
    "a loop of no turns": lambda x: qg.fori_loop(3, 3, lambda i, c: c * 2, x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_at_once_as_compiled(name: str) -> None:
    fn = FUNCTIONS[name]
    same(fn(X), qg.compile(fn, X, target="cpu")(X))


NAN, INF = mx.array(complex("nan")), mx.array([complex("inf")])
COMPLEX: dict[str, Any] = {
    "median": lambda x: qg.median(x, axis=0) + 1,
    "nan": lambda x: qg.where(x.real > 0, NAN, x * 2) + 1,
    "infinite": lambda x: qg.where(x.real > 0, INF, x * 2),
    "in a loop": lambda x: qg.fori_loop(
        0, 2, lambda i, c: qg.where(c.real > 0.5, NAN, c + INF * 0 + 1), x
    ),
    "finite": lambda x: qg.where(x.real > 0, x * 2, x) * (1 + 2j),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_that_are_not_finite(name: str) -> None:
    """MLX writes them into C++ that does not compile."""
    fn, x = COMPLEX[name], mx.fft.fft(X)
    expected = fn(x)
    actual = qg.compile(fn, x, target="cpu")(x)
    assert actual.dtype == expected.dtype
    for part in (mx.real, mx.imag):
        assert mx.allclose(part(actual), part(expected), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: qg.scan(lambda c, s: (c, c), x, length=-1),
        lambda x: qg.scan(lambda c, s: (c, c), x, [1.0, 2.0]),
        lambda x: qg.scan(lambda c, s: (c, c), x, x, length=3),
    ],
)
def test_lengths_that_are_none_are_refused_in_both(fn: Any) -> None:
    with pytest.raises(ControlFlowError, match="first axes"):
        fn(X)
    with pytest.raises(ControlFlowError, match="first axes"):
        qg.trace(fn, X)
