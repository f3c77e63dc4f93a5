"""Arrays of indices and convolutions in regions, against NumPy and MLX."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.runtime.test_region_ops import agree, both_ways
from tests.support import region_cases as cases
from tests.support.arrays import to_numpy
from tests.support.compiler import needs_compiler

pytestmark = needs_compiler
I = mx.array([2, 0, -1, 2])  # noqa: E741
J = mx.array([[1], [0]])
S = slice

INDICES: dict[str, Any] = {
    "rows": I,
    "columns": (S(None), I),
    "last axis": (..., I),
    "of two axes": (I, I),
    "two axes apart": (I, S(None), I),
    "broadcast": (J, I),
    "broadcast apart": (J, S(1, 3), I),
    "with a number": (1, I),
    "a number after": (I, 1),
    "a number apart": (0, S(None), I),
    "a number before, apart": (I, S(None), 0),
    "with a slice": (S(None), I, S(1, 3)),
    "backwards": (S(None, None, -1), S(None), J),
    "a new axis": (None, I),
    "a new axis between": (I, None, I),
    "unsigned": mx.array([1, 2], mx.uint8),
    "all axes": (I, I, I),
    "no arrays": (S(1, 3), ..., 2),
}


@pytest.mark.parametrize("name", INDICES)
def test_taken(name: str) -> None:
    index = INDICES[name]
    x = cases.numbers(4, 4, 4)
    as_numpy = tuple(np.array(i) if isinstance(i, mx.array) else i for i in _items(index))
    for ours, _ in both_ways(lambda x: x[index] * 1, x):
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(x)[as_numpy])


def _items(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


@pytest.mark.parametrize("method", ["add", "subtract", "multiply", "divide", "maximum", "minimum"])
@pytest.mark.parametrize("name", INDICES)
def test_updated(name: str, method: str) -> None:
    """Elements that are named twice are updated twice."""
    index = INDICES[name]
    x = cases.numbers(4, 4, 4)
    shape = to_numpy(x[index]).shape
    updates = cases.positive(*shape, seed=2)
    exact = to_numpy(x).astype(np.float64)
    ufunc = getattr(np, method)
    as_numpy = tuple(np.array(i) if isinstance(i, mx.array) else i for i in _items(index))
    ufunc.at(exact, as_numpy, to_numpy(updates))
    agree(lambda x, u: getattr(x.at[index], method)(u), x, updates, exact=exact)


def test_set_and_left_as_it_was() -> None:
    def write(x: Any, rows: Any) -> Any:
        y = x * 1
        y[mx.array([3, 1])] = rows
        y[:, 1:3] = 7
        return y, x + 1

    x, rows = cases.numbers(4, 4), cases.numbers(2, 4, seed=1)
    (ours, _), (beside, _) = both_ways(write, x, rows)
    wanted = to_numpy(x).copy()
    wanted[[3, 1]] = to_numpy(rows)
    wanted[:, 1:3] = 7
    np.testing.assert_array_equal(to_numpy(ours), wanted)
    np.testing.assert_array_equal(to_numpy(beside), to_numpy(x) + 1)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_one_hot_in_a_loop(dtype: mx.Dtype) -> None:
    def count(ids: Any, x: Any) -> Any:
        def turn(i: Any, c: Any) -> Any:
            return c.at[ids[i]].add(x[i])

        return qg.fori_loop(0, 6, turn, qg.zeros((5,), dtype))

    ids, x = mx.array([3, 1, 3, 0, 4, 3]), cases.numbers(6, dtype=dtype)
    agree(count, ids, x)


def test_numbers_out_of_range_touch_nothing_else() -> None:
    """MLX leaves open what they give; here they are brought into range."""
    far = mx.array([1 << 40, -(1 << 40), 2])
    ((ours, _),) = both_ways(lambda x, i: x.at[i].add(1.0), mx.zeros((3, 2)), mx.clip(far, -3, 2))
    assert ours.sum().item() == 6
    graph = qg.trace(lambda x, i: x[i], qg.spec((3, 2)), qg.spec((3,), mx.int64))
    from qgraph.passes import FormRegions

    program = qg.compile(graph, target="cpu", passes=[FormRegions(everywhere=True)])
    assert program(mx.arange(6.0).reshape(3, 2), far).tolist() == [[4, 5], [0, 1], [4, 5]]


CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "1d": (lambda x, w: qg.conv1d(x, w, stride=2, padding=1), (2, 9, 6), (5, 3, 6)),
    "1d, each channel": (lambda x, w: qg.conv1d(x, w, padding=3, groups=6), (2, 9, 6), (6, 4, 1)),
    "1d, two a channel": (lambda x, w: qg.conv1d(x, w, groups=6), (2, 9, 6), (12, 4, 1)),
    "1d, groups": (lambda x, w: qg.conv1d(x, w, dilation=2, groups=2), (2, 9, 6), (4, 3, 3)),
    "2d": (lambda x, w: qg.conv2d(x, w, padding=(1, 2)), (2, 7, 6, 4), (5, 3, 3, 4)),
    "2d, each channel": (
        lambda x, w: qg.conv2d(x, w, padding=1, groups=4), (2, 7, 6, 4), (4, 3, 3, 1)),
    "2d, 1 by 1": (lambda x, w: qg.conv2d(x, w), (2, 7, 6, 4), (5, 1, 1, 4)),
    "2d, groups": (
        lambda x, w: qg.conv2d(x, w, stride=(2, 1), groups=2), (2, 7, 6, 4), (6, 3, 2, 2)),
    "3d": (lambda x, w: qg.conv3d(x, w, padding=1), (1, 4, 5, 3, 2), (3, 2, 3, 2, 2)),
    "flipped": (
        lambda x, w: qg.conv_general(x, w, padding=1, flip=True), (2, 9, 6), (5, 3, 6)),
    "unlike padding": (
        lambda x, w: qg.conv_general(x, w, padding=([2, 0], [1, 3])), (2, 7, 6, 4), (5, 3, 3, 4)),
    "transposed": (
        lambda x, w: qg.conv_transpose1d(x, w, stride=2, padding=1), (2, 9, 6), (5, 3, 6)),
    "transposed 2d": (
        lambda x, w: qg.conv_transpose2d(x, w, stride=2), (2, 4, 5, 3), (5, 3, 2, 3)),
    "of a view": (
        lambda x, w: qg.conv2d(qg.swapaxes(x, 1, 2), w, stride=2), (2, 7, 6, 4), (5, 3, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, dtype: mx.Dtype) -> None:
    function, *shapes = CONVOLUTIONS[name]
    x, w = (cases.numbers(*shape, seed=i) for i, shape in enumerate(shapes))
    graph = qg.trace(function, qg.spec(x.shape), qg.spec(w.shape))
    half = [a.astype(dtype) for a in (x, w)]
    body = qg.compile(graph, target="cpu", passes=[])
    exact = to_numpy(body(*(a.astype(mx.float32) for a in half))).astype(np.float64)
    agree(function, *half, exact=exact)
