"""Random views of a packed weight before a product, an index or a sum: the numbers stay."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qgraph as qg
from tests.support.fusion import Weight, check, not_compiled, ops, optimized, random, wide

SHAPES = [(12, 64), (64, 64), (2, 6, 64), (3, 2, 2, 32), (64, 4, 32)]
SETTINGS = settings(
    max_examples=150,
    derandomize=True,
    print_blob=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def _factors(draw: Any, size: int, most: int = 3) -> tuple[int, ...]:
    """A shape of that size."""
    shape = []
    for _ in range(draw(st.integers(0, most - 1))):
        part = draw(st.sampled_from([d for d in (1, 2, 3, 4, 8, 16, 32, 64) if size % d == 0]))
        shape.append(part)
        size //= part
    return (*shape, size)


@st.composite
def views(draw: Any) -> tuple[tuple[int, ...], list[tuple[str, Any]]]:
    """A weight's shape, and steps (op, argument) that keep at least two axes."""
    shape = start = draw(st.sampled_from(SHAPES))
    steps: list[tuple[str, Any]] = []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["transpose", "reshape", "slice", "expand", "broadcast"]))
        if kind == "transpose":
            axes = tuple(draw(st.permutations(range(len(shape)))))
            steps.append((kind, axes))
            shape = tuple(shape[i] for i in axes)
        elif kind == "reshape":
            if draw(st.booleans()):  # leave the last axis whole
                new = (*_factors(draw, math.prod(shape[:-1])), shape[-1])
            else:
                new = _factors(draw, math.prod(shape))
            if len(new) < 2:
                continue
            steps.append((kind, new))
            shape = new
        elif kind == "slice":
            axis = draw(st.integers(0, len(shape) - 1))
            stop = draw(st.integers(1, shape[axis]))
            index = [slice(None)] * len(shape)
            index[axis] = slice(0, stop, draw(st.sampled_from([None, 2])))
            steps.append((kind, tuple(index)))
            sizes = list(shape)
            sizes[axis] = len(range(shape[axis])[index[axis]])
            shape = tuple(sizes)
        elif kind == "expand" and len(shape) < 4:
            axis = draw(st.integers(0, len(shape)))
            steps.append((kind, axis))
            shape = (*shape[:axis], 1, *shape[axis:])
        elif kind == "broadcast" and len(shape) < 4:
            shape = (2, *shape)
            steps.append((kind, shape))
    return start, steps


APPLY = {
    "transpose": qg.transpose,
    "reshape": qg.reshape,
    "slice": lambda w, index: w[index],
    "expand": qg.expand_dims,
    "broadcast": qg.broadcast_to,
}
FUSED = [0]


@pytest.mark.parametrize("form", ["affine-4-32", "nvfp4"])
@pytest.mark.parametrize("product", ["matmul", "vector", "left", "einsum", "gather_mm"])
@SETTINGS
@given(made=views(), seed=st.integers(0, 3))
def test_products_of_views(product: str, form: str, made: Any, seed: int) -> None:
    start, steps = made
    weight = Weight(form, random(*start, seed=seed))

    def view() -> Any:
        w = weight.dequantize(dtype=mx.float32)
        for op, argument in steps:
            w = APPLY[op](w, argument)
        return w

    shape = qg.trace(view).outputs[0].shape
    rows, columns = shape[-2:]
    batch = math.prod(shape[:-2])
    if product == "left":
        x, fn = random(columns, 3), lambda x: view() @ x
    elif product == "vector":
        x, fn = random(rows), lambda x: x @ view()
    elif product == "einsum":
        x, fn = random(3, rows), lambda x: qg.einsum("mk,...kn->...mn", x, view())
    elif product == "gather_mm":
        ids = mx.array([batch - 1, 0], mx.uint32)
        x, fn = random(2, 3, rows), lambda x: qg.gather_mm(x, view(), rhs_indices=ids)
    else:
        x, fn = random(3, rows), lambda x: x @ view()
    plan = optimized(fn, x)
    FUSED[0] += bool({"quantized_matmul", "gather_qmm"} & set(ops(plan.graph)))
    with not_compiled():
        written, now = (
            qg.compile(g, passes=[], target="cpu")(x) for g in (plan.source, plan.graph)
        )
    assert written.shape == now.shape
    assert mx.allclose(written, now, rtol=1e-4, atol=1e-3)


PLACES = st.one_of(
    st.integers(0, 3),
    st.sampled_from([slice(None), slice(1, None), slice(None, None, -1), slice(0, 2), ...]),
    st.just([1, 0]),
)


@SETTINGS
@given(
    axes=st.permutations(range(3)),
    places=st.lists(PLACES, min_size=1, max_size=3).filter(lambda p: p.count(...) < 2),
)
def test_indices_are_bit_for_bit(axes: list[int], places: list[Any]) -> None:
    """Of a weight and of its transposes, with numbers, slices, dots and indices of the run."""
    weight = Weight("affine-4-32", random(6, 4, 64))
    arrays = [mx.array(place) for place in places if isinstance(place, list)]

    def fn(*arrays: Any) -> Any:
        given = iter(arrays)
        index = tuple(next(given) if isinstance(p, list) else p for p in places)
        return qg.transpose(weight.dequantize(), tuple(axes))[index]

    plan = optimized(fn, *arrays)
    with not_compiled():
        written, now = (
            qg.compile(g, passes=[], target="cpu")(*arrays) for g in (plan.source, plan.graph)
        )
    assert written.shape == now.shape
    assert mx.array_equal(written, now)


SIZES = {"a": 2, "b": 6, "k": 64, "m": 3, "n": 2}


@st.composite
def sums(draw: Any) -> tuple[str, str, str]:
    """The letters of x, of a weight of axes a, b, k in some order, and of the result."""
    summed = draw(st.lists(st.sampled_from("abk"), min_size=1, max_size=2, unique=True))
    batch = [c for c in "abk" if c not in summed and draw(st.booleans())]
    left = draw(st.permutations([*summed, *batch, *draw(st.sampled_from(["", "m", "mn"]))]))
    result = draw(st.permutations(sorted({*left, *"abk"} - {*summed})))
    return "".join(left), "".join(draw(st.permutations("abk"))), "".join(result)


@SETTINGS
@given(letters=sums(), weight_first=st.booleans())
def test_einsum(letters: tuple[str, str, str], weight_first: bool) -> None:
    left, right, result = letters
    weight, x = Weight("mxfp4", random(2, 6, 64)), random(*(SIZES[c] for c in left))
    spelt = f"{right},{left}->{result}" if weight_first else f"{left},{right}->{result}"

    def fn(x: Any) -> Any:
        dense = weight.dequantize(dtype=mx.float32)
        w = qg.transpose(dense, tuple("abk".index(c) for c in right))
        return qg.einsum(spelt, *((w, x) if weight_first else (x, w)))

    plan = optimized(fn, x)
    FUSED[0] += "quantized_matmul" in ops(plan.graph)
    expected = np.einsum(f"{left},abk->{result}", wide(x), weight.dense)
    check(plan, [x], expected, 1e-5)


def test_many_of_them_fused() -> None:
    """Or the test above says nothing; it runs after it."""
    if not FUSED[0]:
        pytest.skip("runs with the test above")
    assert FUSED[0] > 30
