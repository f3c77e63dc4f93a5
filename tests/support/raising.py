"""What the tests of raising share: import, raise, compare; and the ops in NumPy float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

import qgraph as qg
from qgraph.ir import Graph
from qgraph.passes import RaiseAttention, RaiseLayerNorm, RaiseRmsNorm, RaiseRope
from tests.support.arrays import to_numpy
from tests.support.reference import relative_error

PASSES = [RaiseLayerNorm(), RaiseRmsNorm(), RaiseRope(), RaiseAttention()]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
TOLERANCE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}
Float64 = npt.NDArray[np.float64]


def ops(graph: Graph) -> list[str]:
    return [node.op for _, node in graph.walk() if node.op != "constant"]


def raised(graph: Graph) -> Graph:
    return qg.optimize(graph, passes=PASSES, target="cpu").graph


def text(graph: Graph) -> str:
    return graph.format(origins=False)


def random(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def check(
    fn: Callable[..., mx.array], *arrays: mx.array, becomes: list[str], like: Float64 | None = None
) -> Graph:
    """`fn` raised to these ops, its results the same bits as before and near to float64's."""
    graph = qg.from_mlx(fn, *arrays, name="f")
    after = raised(graph)
    assert sorted(ops(after)) == sorted(becomes)
    before, now = (qg.compile(g, passes=[], target="cpu")(*arrays) for g in (graph, after))
    assert mx.array_equal(before, now, equal_nan=True)
    assert mx.array_equal(now, fn(*arrays), equal_nan=True)
    whole = qg.compile(graph, target="cpu")(*arrays)
    assert mx.array_equal(whole, now, equal_nan=True)
    if like is not None:
        assert now.dtype in TOLERANCE
        assert relative_error(to_numpy(now), like) < TOLERANCE[now.dtype]
    return after


def left_alone(fn: Callable[..., mx.array], *arrays: mx.array) -> None:
    """No pass finds anything in `fn`: each gives back the very graph."""
    graph = qg.from_mlx(fn, *arrays)
    for run in PASSES:
        assert run(graph) is graph, f"{run.name} found something"


def wide(array: mx.array) -> Float64:
    return to_numpy(array).astype(np.float64)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> Float64:
    x64 = wide(x)
    result = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + eps)
    return result if weight is None else result * wide(weight)


def layer_norm(x: mx.array, weight: Any, bias: Any, eps: float) -> Float64:
    x64 = wide(x)
    centred = x64 - x64.mean(axis=-1, keepdims=True)
    result = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps)
    result = result if weight is None else result * wide(weight)
    return result if bias is None else result + wide(bias)


def rope(
    x: mx.array, dims: int, traditional: bool, frequencies: Float64, scale: float, offset: Any
) -> Float64:
    """Rotated by position times 1 / frequency; `offset` is a number or one for each of a batch."""
    x64 = wide(x)
    start = np.reshape(np.asarray(offset, np.float64), (-1,) + (1,) * (x.ndim - 2))
    positions = (np.arange(x.shape[-2]) + start) * scale
    angle = positions[..., None] / frequencies
    rotated, rest = x64[..., :dims], x64[..., dims:]
    if traditional:
        one, two = rotated[..., 0::2], rotated[..., 1::2]
    else:
        one, two = rotated[..., : dims // 2], rotated[..., dims // 2 :]
    turned = one * np.cos(angle) - two * np.sin(angle), one * np.sin(angle) + two * np.cos(angle)
    if traditional:
        both = np.stack(turned, axis=-1).reshape(rotated.shape)
    else:
        both = np.concatenate(turned, axis=-1)
    return np.concatenate([both, rest], axis=-1)


def by_base(base: float, dims: int) -> Float64:
    return np.asarray(base ** (np.arange(dims // 2) / (dims // 2)), np.float64)


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any = None, sinks: Any = None
) -> Float64:
    """`mask` is "causal", boolean, additive or None, and fits (batch, heads, rows, columns)."""
    q64, k64, v64 = wide(q), wide(k), wide(v)
    groups = q.shape[1] // k.shape[1]
    k64, v64 = np.repeat(k64, groups, axis=1), np.repeat(v64, groups, axis=1)
    scores = scale * q64 @ np.swapaxes(k64, -1, -2)
    rows, columns = scores.shape[-2:]
    if isinstance(mask, str):
        scores = np.where(np.tri(rows, columns, columns - rows, dtype=bool), scores, -np.inf)
    elif mask is not None and mask.dtype == mx.bool_:
        scores = np.where(np.array(mask), scores, -np.inf)
    elif mask is not None:
        scores = scores + wide(mask)
    top = scores.max(axis=-1, keepdims=True)
    exps = np.exp(scores - top)
    total = exps.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(wide(sinks)[None, :, None, None] - top)
    return np.asarray(exps / total @ v64, np.float64)
