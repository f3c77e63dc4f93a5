"""Random views of a packed weight before a product, an index or a sum: the numbers stay."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qgraph as qg
from tests.fusion import Weight, not_compiled, ops, optimized, random

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
@pytest.mark.parametrize("product", ["matmul", "left", "einsum", "gather_mm"])
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


def test_many_of_them_fused() -> None:
    """Or the test above says nothing; it runs after it."""
    if not FUSED[0]:
        pytest.skip("runs with the test above")
    assert FUSED[0] > 30
