"""Reductions, scans, sorts, convolutions and transforms over axes, flags and kinds of number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from tests.support.fusion import not_compiled

CUBE = mx.random.normal((3, 4, 6), key=mx.random.key(0)) * 5
DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8, mx.bool_, mx.int64]


def exact(fn: Callable[..., Any], *arrays: mx.array, compiled: bool = False) -> None:
    reference = mx.compile(fn) if compiled else fn
    expected = qg.tree.flatten(reference(*arrays))[0]
    graph = qg.from_mlx(fn, *arrays)
    with nullcontext() if compiled else not_compiled():
        program = qg.compile(graph, passes=[], target="cpu")
        actual = qg.tree.flatten(program(*arrays))[0]
        mx.eval(actual)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert mx.array_equal(a, b, equal_nan=a.dtype != mx.bool_).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions(dtype: mx.Dtype) -> None:
    x = CUBE.astype(dtype)
    names = ["sum", "prod", "min", "max", "all", "any", "argmin", "argmax"]
    if mx.issubdtype(dtype, mx.floating):
        names += ["mean", "var", "std", "logsumexp"]
    axes = (0, 1, -1, None, (0, 2), (2, 1))
    calls = [
        (getattr(mx, name), axis, keep)
        for name, axis, keep in itertools.product(names, axes, (False, True))
        if not (name.startswith("arg") and isinstance(axis, tuple))
    ]
    exact(lambda x: [call(x, axis=axis, keepdims=keep) for call, axis, keep in calls], x)


@pytest.mark.parametrize("dtype", DTYPES[:5], ids=str)
def test_scans_and_sorts(dtype: mx.Dtype) -> None:
    x = CUBE.astype(dtype)
    scans = ["cumsum", "cumprod", "cummin", "cummax"]
    if mx.issubdtype(dtype, mx.floating):
        scans.append("logcumsumexp")
    flags = itertools.product(scans, (0, 1, -1, None), (False, True), (False, True))
    scanned = [(n, a, {"reverse": r, "inclusive": i}) for n, a, r, i in flags]
    exact(lambda x: [getattr(mx, n)(x, axis=axis, **flags) for n, axis, flags in scanned], x)
    exact(
        lambda x: [
            part
            for axis in (0, 1, -1, None)
            for part in (
                mx.sort(x, axis=axis),
                mx.argsort(x, axis=axis),
                mx.sort(mx.partition(x, 2, axis=axis), axis=axis),
                mx.topk(x, 2, axis=axis),
            )
        ],
        x,
    )


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_softmax(dtype: mx.Dtype) -> None:
    calls = list(itertools.product((0, -1, (0, 1), None), (False, True)))
    exact(lambda x: [mx.softmax(x, axis, precise=p) for axis, p in calls], CUBE.astype(dtype))


def test_argpartition() -> None:
    """Which of two orders of equal rank comes out is MLX's, so on the same machine the same."""
    exact(lambda x: [mx.argpartition(x, k, axis) for k in (0, 2) for axis in (0, 1, 2)], CUBE)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int) -> None:
    x = mx.random.normal((2, *(7, 6, 5)[:dims], 4), key=mx.random.key(1))
    w = mx.random.normal((6, *(3, 2, 2)[:dims], 2), key=mx.random.key(2))
    whole = mx.random.normal((6, *(3, 2, 2)[:dims], 4), key=mx.random.key(3))
    flip = mx.conv_general
    exact(
        lambda x, v: [
            flip(x, v, padding=([0] * dims, [1] * dims), kernel_dilation=2),
            flip(x, v, input_dilation=2, flip=True),
            getattr(mx, f"conv{dims}d")(x, v, 2, 1),
            getattr(mx, f"conv_transpose{dims}d")(x, v, stride=2, padding=1, output_padding=1),
        ],
        x, whole,
    )  # fmt: skip
    if dims < 3:  # MLX has no groups in three dimensions
        exact(lambda x, w: flip(x, w, stride=2, padding=1, groups=2), x, w)


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
def test_transforms(norm: Any) -> None:
    def fn(x: mx.array) -> list[mx.array]:
        made = []
        for axes in ((0,), (2,), (0, 1), (1, 2), (0, 1, 2)):
            half = mx.fft.rfftn(x, axes=axes, norm=norm)
            last = x.shape[axes[-1]]
            made += [
                half.real,
                mx.fft.ifftn(mx.fft.fftn(x, axes=axes, norm=norm), axes=axes, norm=norm).imag,
                mx.fft.irfftn(half, axes=axes, norm=norm),
                mx.fft.irfftn(half, s=[*(x.shape[a] for a in axes[:-1]), last - 1], axes=axes),
            ]
        return [*made, mx.fft.fft(x, n=9).real, mx.fft.rfft(x, n=5, axis=1).imag]

    # A program runs under mx.compile, which rounds once less in a complex product that it fuses.
    exact(fn, CUBE, compiled=True)


def test_pads_and_views() -> None:
    exact(
        lambda x: [
            mx.pad(x, 1),
            mx.pad(x, (1, 2), constant_values=-3.0),
            mx.pad(x, [(0, 0), (2, 0), (0, 1)], mode="edge"),
            mx.roll(x, 2, axis=1),
            mx.tile(x, (1, 2, 1)),
            mx.repeat(x, 3, axis=-1),
            mx.diagonal(x, 1, 0, 2),
            mx.as_strided(x, (2, 3), (3, 5), 4),
            mx.view(x, mx.int16),
            mx.unflatten(x, -1, (2, -1)),
            mx.moveaxis(x, 0, -1),
            *mx.split(x, [1, 1, 4], axis=2),
            *mx.split(x, 2, axis=1),
            mx.stack([x, x * 2], axis=2),
            mx.tril(x, 1),
            mx.diag(x[0, 0]),
            mx.outer(x[0, 0], x[0, 1]),
            mx.einsum("abc,dbc->ad", x, x),
        ],
        CUBE,
    )


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint16, mx.int32, mx.uint64], ids=str)
def test_bits(dtype: mx.Dtype) -> None:
    a, b = mx.array([1, 7, 12, 100], dtype), mx.array([3, 2, 1, 4], dtype)
    exact(
        lambda a, b: [a & b, a | b, a ^ b, a << b, a >> b, ~a, mx.divmod(a, b)[1], a // b, a % b,
                      mx.left_shift(a, 1), mx.minimum(a, b), a**2],
        a, b,
    )  # fmt: skip
