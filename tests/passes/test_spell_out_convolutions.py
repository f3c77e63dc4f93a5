"""Short convolutions of channels, as the passes for CUDA write them, against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.passes import SpellOutConvolutions
from qgraph.target import Target
from tests.support.arrays import to_numpy

CHANNELS, LENGTH = 6, 4
WEIGHT = mx.random.normal((CHANNELS, LENGTH, 1), key=mx.random.key(1))
CUDA = Target(mx.Device(mx.cpu, 0), "cuda", "sm_90", 2)


def convolution(weight: mx.array = WEIGHT, **settings: Any) -> Any:
    settings = {"groups": CHANNELS, **settings}
    return lambda x: qg.conv_general(x, qg.tensor(weight), **settings)


def given(length: int = LENGTH, rows: int = 2, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((rows, length, CHANNELS), key=mx.random.key(2)).astype(dtype)


def plan(fn: Any, x: mx.array) -> qg.Plan:
    return qg.optimize(qg.trace(fn, x, name="f"), passes=[SpellOutConvolutions(CUDA)])


def ops(graph: qg.Graph) -> list[str]:
    return [node.op for _, node in graph.walk()]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 3])
def test_numbers(dtype: mx.Dtype, stride: int) -> None:
    """Case 1; with one position it is no matter how far the next would be."""
    x = given(dtype=dtype)
    made = plan(convolution(WEIGHT.astype(dtype), stride=stride), x)
    assert "conv_general" not in ops(made.graph)
    (entry,) = made.ledger()
    assert (entry.decision, entry.reason) == ("chosen", "the sum of 4 products")
    got = qg.compile(made.graph, passes=[], target="cpu")(x)
    weight = to_numpy(WEIGHT.astype(dtype)).astype(np.float64)
    want = np.einsum("nlc,cl->nc", to_numpy(x).astype(np.float64), weight[..., 0])[:, None]
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == mx.float32 else 8e-3
    np.testing.assert_allclose(to_numpy(got), want, rtol=tolerance, atol=tolerance)


def test_text() -> None:
    made = plan(convolution(WEIGHT[:, :2]), given(2))
    assert made.graph.format(origins=False).splitlines()[1:] == [
        "  %0: f32[2,1,6] = getitem(x, [:, 0:1])",
        "  %1: f32[6] = getitem(@weight, [:, 0, 0])",
        "  %2: f32[2,1,6] = multiply(%0, %1)",
        "  %3: f32[2,1,6] = getitem(x, [:, 1:2])",
        "  %4: f32[6] = getitem(@weight, [:, 1, 0])",
        "  %5: f32[2,1,6] = multiply(%3, %4)",
        "  %6: f32[2,1,6] = add(%2, %5)",
        "  return %6",
    ]


def test_in_a_loop() -> None:
    """The last tokens are carried."""

    def fn(x: Any) -> Any:
        def turn(_: Any, x: Any) -> Any:
            return qg.concatenate([x[:, 1:], convolution()(x)], axis=1)

        return qg.fori_loop(0, 3, turn, x)

    made = plan(fn, given())
    assert "conv_general" not in ops(made.graph)
    got = qg.compile(made.graph, passes=[], target="cpu")(given())
    x, weight = (to_numpy(a).astype(np.float64) for a in (given(), WEIGHT))
    for _ in range(3):
        x = np.concatenate([x[:, 1:], np.einsum("nlc,cl->nc", x, weight[..., 0])[:, None]], axis=1)
    np.testing.assert_allclose(to_numpy(got), x, rtol=1e-4, atol=1e-5)


LONG = mx.random.normal((CHANNELS, 9, 1), key=mx.random.key(3))
NEAR_MISSES: dict[str, tuple[Any, mx.array]] = {
    "two positions": (convolution(), given(LENGTH + 1)),
    "padding": (convolution(padding=1), given()),
    "a kernel with holes": (convolution(WEIGHT[:, :2], kernel_dilation=2), given(3)),
    "an input with holes": (convolution(WEIGHT[:, :3], input_dilation=2), given(2)),
    "the other way round": (convolution(flip=True), given()),
    "too long": (convolution(LONG), given(9)),
    "mixed channels": (convolution(mx.ones((CHANNELS, LENGTH, CHANNELS)), groups=1), given()),
    "more channels": (convolution(mx.ones((2 * CHANNELS, LENGTH, 1))), given()),
    "pairs of channels": (convolution(mx.ones((CHANNELS, LENGTH, 2)), groups=3), given()),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case: str) -> None:
    fn, x = NEAR_MISSES[case]
    graph = qg.trace(fn, x, name="f")
    assert SpellOutConvolutions(CUDA)(graph) is graph


def test_two_axes() -> None:
    weight = mx.ones((CHANNELS, 2, 2, 1))
    fn = lambda x: qg.conv_general(x, qg.tensor(weight), groups=CHANNELS)  # noqa: E731
    graph = qg.trace(fn, mx.ones((1, 2, 2, CHANNELS)), name="f")
    assert SpellOutConvolutions(CUDA)(graph) is graph


@pytest.mark.parametrize("backend", ["cpu", "metal"])
def test_other_targets_keep_theirs(backend: str) -> None:
    graph = qg.trace(convolution(), given())
    assert SpellOutConvolutions(Target(mx.Device(mx.cpu, 0), backend, "any", 2))(graph) is graph
