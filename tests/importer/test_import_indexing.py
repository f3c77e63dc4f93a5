"""Random indices: what is imported reads and writes the elements that the function does."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph as qg

SHAPE = (3, 4, 5, 2)
X = mx.arange(120.0).reshape(SHAPE)


def slices(size: int, *, some: bool) -> st.SearchStrategy[slice]:
    """Any slice, or with `some` one that is not empty: MLX divides by the size of updates."""
    ends = st.none() | st.integers(-size - 1, size + 1)
    found = st.builds(slice, ends, ends, st.sampled_from([None, 1, 2, -1, -2, 3]))
    return found.filter(lambda s: len(range(size)[s]) > 0) if some else found


@st.composite
def arrays(draw: st.DrawFn, size: int, shape: tuple[int, ...]) -> mx.array:
    count = 1
    for n in shape:
        count *= n
    numbers = st.lists(st.integers(-size, size - 1), min_size=count, max_size=count)
    return mx.array(draw(numbers), mx.int32).reshape(shape)


@st.composite
def indices(draw: st.DrawFn, some: bool = True) -> tuple[Any, ...]:
    """A slice, number, array or nothing for each of some axes; arrays broadcast together."""
    found: list[Any] = []
    shapes = draw(st.sampled_from([((2,),), ((3,), (1,)), ((2, 1), (3,)), ((2, 2), (2,), ())]))
    for size in SHAPE[: draw(st.integers(1, 4))]:
        kind = draw(st.sampled_from(["slice", "number", "array", "array"]))
        if kind == "slice":
            found.append(draw(slices(size, some=some)))
        elif kind == "number":
            found.append(draw(st.integers(-size, size - 1)))
        else:
            found.append(draw(arrays(size, draw(st.sampled_from(shapes)))))
        if draw(st.integers(0, 7)) == 0:
            found.append(None)
    return tuple(found)


def agree(fn: Any) -> None:
    try:
        expected = fn(X)
        mx.eval(expected)
    except (ValueError, IndexError):
        return  # MLX takes no such index
    graph = qg.from_mlx(fn, X)
    assert mx.array_equal(qg.compile(graph, passes=[], target="cpu")(X), expected).item()
    assert mx.array_equal(qg.compile(graph, target="cpu")(X), expected).item()


@settings(max_examples=120, deadline=None)
@given(indices(some=False))
def test_reading(index: tuple[Any, ...]) -> None:
    agree(lambda x: x[index])


@settings(max_examples=80, deadline=None)
@given(indices(), st.booleans())
def test_writing(index: tuple[Any, ...], negative: bool) -> None:
    def fn(x: mx.array) -> mx.array:
        y = mx.array(x)
        y[index] = -x[index] if negative else 1000.0
        return y

    agree(fn)


@settings(max_examples=80, deadline=None)
@given(indices(), st.sampled_from(["add", "multiply", "maximum", "minimum"]))
def test_combining(index: tuple[Any, ...], how: str) -> None:
    agree(lambda x: getattr(x.at[index], how)(2.0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.data())
def test_under_vmap(axis: int, out: int, data: st.DataObject) -> None:
    """Indices into the axes that are left, one set for each element of the mapped axis."""
    inner = [size for d, size in enumerate(SHAPE) if d != axis]
    rows = data.draw(arrays(inner[0], (SHAPE[axis], 2)))
    columns = data.draw(arrays(inner[1], (SHAPE[axis], 2)))
    agree(lambda x: mx.vmap(lambda e, i, j: e[i, j] * 2, in_axes=(axis, 0, 0),
                            out_axes=min(out, 2))(x, rows, columns))  # fmt: skip
    agree(lambda x: mx.vmap(lambda e, i: mx.take(e, i, axis=1), in_axes=(axis, 0))(x, columns))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.data())
def test_along_an_axis(axis: int, data: st.DataObject) -> None:
    shape = tuple(2 if d == axis else n for d, n in enumerate(SHAPE))
    index = data.draw(arrays(SHAPE[axis], shape))
    agree(lambda x: mx.take_along_axis(x, index, axis))
    agree(lambda x: mx.grad(lambda a: (mx.take_along_axis(a, index, axis) ** 2).sum())(x))
    # Where an index comes twice, which one stays is left open, so write the same number.
    agree(lambda x: mx.put_along_axis(x, index, mx.array(7.0), axis))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=2), st.integers(0, 2))
def test_starts_that_only_the_run_knows(start: list[int], axis: int) -> None:
    axes = [axis, axis + 1]
    sizes = [2 if d in axes else n for d, n in enumerate(SHAPE)]
    at = mx.array([min(s, SHAPE[d] - 2) for s, d in zip(start, axes, strict=True)])

    def fn(x: mx.array) -> mx.array:
        part = mx.slice(x, at, axes, sizes)
        return mx.slice_update(x, part * 2, at, axes)

    agree(fn)
