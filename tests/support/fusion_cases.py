"""The numbered cases of fusion as a table, for `tests/passes/test_fuse_quantized_matmul.py`.

A model gets a `Given`, the weight wherever it comes from, and x; `expected` gets both in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg
from qgraph.target import Target
from tests.support.fusion import K, N, Weight, random, wide


@dataclass(frozen=True)
class Given:
    """A weight in a model: its packed parts or its float values, as tensors."""

    weight: Weight
    values: tuple[Any, ...]

    def dense(self, dtype: mx.Dtype | None = mx.float32) -> Any:
        return self.weight.dequantize(self.values, dtype=dtype)


Model = Callable[[Given, Any], Any]


@dataclass(frozen=True)
class Case:
    """One way to write a product, a look-up or a slice of a packed weight.

    Attributes:
        number: of the case in `docs/fusion.md`.
        model: (given, x) -> a tensor or a list of them.
        expected: (dense weight, x) in float64 -> the same in NumPy.
        has: ops that the optimized graph must hold.
        gone: ops that it must not.
        w, x: shapes; `x` may be an array of indices.
        dtype: of scales and x.
        is_float: the weight is given as floats, and the model quantizes it.
        target: the backend to legalize for.
        formats: which it can be written in.
        noted: the case that the ledger gives for it, where it is another one.
    """

    number: int
    name: str
    model: Model
    expected: Callable[[Any, Any], Any]
    has: tuple[str, ...] = ("quantized_matmul",)
    gone: tuple[str, ...] = ("dequantize", "matmul", "addmm", "einsum", "tensordot", "inner")
    w: tuple[int, ...] = (N, K)
    x: tuple[int, ...] | mx.array = (5, K)
    dtype: mx.Dtype = mx.float32
    is_float: bool = False
    target: str = "cpu"
    formats: Callable[[str], bool] = lambda form: True
    noted: int | None = None

    @property
    def in_ledger(self) -> int:
        return self.number if self.noted is None else self.noted

    @property
    def id(self) -> str:
        return f"{self.number} {self.name}"


def plain(w: Any, x: Any) -> Any:
    return x @ w.T


def _view(name: str, view: Callable[[Any], Any]) -> Case:
    return Case(1, name, lambda q, x: x @ view(q.dense()), plain)


C = random(N, seed=7)
EXPERTS, IDS = (4, N, K), mx.array([3, 1, 1], mx.uint32)
LOOKED_UP = mx.array([[5, 0, 5], [95, 1, 2]])
ROWS = ("dequantize",)
"""Of a look-up: dequantizes rows, and no more of them than asked for (see the test)."""


def _experts(sides: str, is_sorted: bool = False) -> Model:
    ids = mx.array([0, 1, 3], mx.uint32) if is_sorted else IDS
    named = {"rhs_indices": ids} if sides == "rhs" else {"lhs_indices": ids}
    if sides == "both":
        named = {"lhs_indices": ids, "rhs_indices": ids[::-1]}
    return lambda q, x: qg.gather_mm(x, q.dense().swapaxes(1, 2), **named, sorted_indices=is_sorted)


def _tied(q: Given, ids: Any) -> Any:
    return qg.tanh(qg.take(q.dense(), ids, axis=0)) @ q.dense().T


def _several(q: Given, x: Any) -> Any:
    w = q.dense()
    return [x @ w.T, (x * 2.0) @ w.T, w.sum(axis=1)]


def _split(q: Given, x: Any) -> Any:
    return [x @ part.T for part in qg.split(q.dense(), 3, axis=0)]


def _thirds(w: Any) -> list[Any]:
    return [w[i * N // 3 : (i + 1) * N // 3, :] for i in range(3)]


def _slice_and_whole(q: Given, x: Any) -> Any:
    w = q.dense()
    return [x @ w[:8].T, x @ w.T, qg.take(w, mx.array([1, 2]), axis=0)]


def _joined(q: Given, x: Any) -> Any:
    return x @ qg.concatenate([q.dense()[:16], q.dense()[64:]]).T


def _fake(q: Given, x: Any) -> Any:
    settings = q.weight.settings
    parts = qg.quantize(q.values[0], **settings)
    return x @ qg.dequantize(*parts, **settings, dtype=mx.float32).T


def _imported(q: Given, x: Any) -> Any:
    settings = q.weight.settings
    return qg.call(lambda x, *p: x @ mx.dequantize(*p, **settings).T, x, *q.values)


def _rows_of_packed(q: Given, x: Any) -> Any:
    every_other = [qg.tensor(part)[::2] for part in q.values]
    return qg.quantized_matmul(x, *every_other, **q.weight.settings)


def _is_exported(form: str) -> bool:
    return form.startswith("affine") or form == "mxfp4"


CASES = [
    Case(1, "plain", lambda q, x: x @ q.dense(), lambda w, x: x @ w, x=(5, N)),
    _view("T", lambda w: w.T),
    _view("transpose", lambda w: qg.transpose(w, (1, 0))),
    _view("swapaxes", lambda w: w.swapaxes(0, 1)),
    _view("moveaxis", lambda w: w.moveaxis(0, -1)),
    _view("reshape", lambda w: w.reshape(8, 12, K).reshape(N, K).T),
    _view("expand_dims, squeeze", lambda w: qg.expand_dims(w, 0).squeeze(0).T),
    _view("broadcast_to", lambda w: qg.broadcast_to(w.T, (K, N))),
    Case(2, "cast of w", lambda q, x: x @ q.dense(None).astype(mx.float32).T, plain,
         dtype=mx.float16),
    Case(2, "cast of x", lambda q, x: x.astype(mx.float32) @ q.dense().T, plain, dtype=mx.float16),
    Case(2, "cast of the result", lambda q, x: (x @ q.dense(mx.float16).T).astype(mx.float32),
         plain, dtype=mx.float16, noted=1),
    Case(2, "other scales", lambda q, x: x.astype(mx.float16) @ q.dense(mx.bfloat16).T, plain,
         dtype=mx.bfloat16),
    Case(3, "addmm", lambda q, x: qg.addmm(C, x, q.dense().T, alpha=0.5, beta=2.0),
         lambda w, x: 0.5 * (x @ w.T) + 2 * wide(C)),
    Case(3, "plus", lambda q, x: x @ q.dense().T + C, lambda w, x: x @ w.T + wide(C), noted=1),
    Case(3, "scaled", lambda q, x: (x * 3.0) @ q.dense().T * 0.5, lambda w, x: 1.5 * (x @ w.T),
         noted=1),
    Case(3, "scaled weight", lambda q, x: x @ (2.0 * q.dense().T / 3.0),
         lambda w, x: x @ w.T * 2 / 3),
    Case(3, "einsum", lambda q, x: qg.einsum("mk,nk->mn", x, q.dense()), plain),
    Case(3, "einsum, w first", lambda q, x: qg.einsum("nk,mk->nm", q.dense(), x),
         lambda w, x: w @ x.T),
    Case(3, "tensordot", lambda q, x: qg.tensordot(x, q.dense(), [[1], [1]]), plain),
    Case(3, "inner", lambda q, x: qg.inner(x, q.dense()), plain),
    Case(4, "on the left", lambda q, x: q.dense() @ x, lambda w, x: w @ x, x=(K, 5)),
    Case(4, "a vector", lambda q, x: q.dense() @ x, lambda w, x: w @ x, x=(K,)),
    Case(5, "batches", lambda q, x: x @ q.dense().swapaxes(1, 2),
         lambda w, x: x @ w.swapaxes(1, 2), w=EXPERTS, x=(4, 5, K)),
    Case(5, "gather_mm, rhs", _experts("rhs"),
         lambda w, x: x @ w[np.array(IDS)].swapaxes(1, 2), ("gather_qmm",),
         ("dequantize", "gather_mm"), EXPERTS, (3, 5, K)),
    Case(5, "gather_mm, sorted", _experts("rhs", True),
         lambda w, x: x @ w[[0, 1, 3]].swapaxes(1, 2), ("gather_qmm",),
         ("dequantize", "gather_mm"), EXPERTS, (3, 5, K)),
    Case(5, "gather_mm, lhs", _experts("lhs"),
         lambda w, x: x[np.array(IDS)] @ w.swapaxes(1, 2), ("gather_qmm",),
         ("dequantize", "gather_mm"), (3, N, K), (4, 5, K)),
    Case(5, "gather_mm, both", _experts("both"),
         lambda w, x: x[np.array(IDS)] @ w[np.array(IDS)[::-1]].swapaxes(1, 2), ("gather_qmm",),
         ("dequantize", "gather_mm"), EXPERTS, (4, 5, K)),
    Case(5, "gather_mm, one expert",
         lambda q, x: qg.gather_mm(
             x, qg.expand_dims(q.dense(), 0).swapaxes(1, 2), rhs_indices=0 * IDS),
         lambda w, x: x @ w.T, ("gather_qmm",), ("dequantize", "gather_mm"), x=(3, 5, K)),
    Case(6, "take", lambda q, ids: qg.take(q.dense(), ids, axis=0), lambda w, ids: w[ids],
         ROWS, (), x=LOOKED_UP),
    Case(6, "index", lambda q, ids: q.dense()[ids], lambda w, ids: w[ids], ROWS, (),
         x=LOOKED_UP),
    Case(6, "tied", _tied, lambda w, ids: np.tanh(w[ids]) @ w.T,
         ("dequantize", "quantized_matmul"), ("matmul",), x=LOOKED_UP),
    Case(7, "several products", _several, lambda w, x: [x @ w.T, 2 * x @ w.T, w.sum(axis=1)],
         ("dequantize", "quantized_matmul", "sum"), ("matmul",), noted=1),
    Case(8, "split", _split, lambda w, x: np.split(x @ w.T, 3, axis=1)),
    Case(8, "slice", lambda q, x: x @ q.dense()[16:80].T, lambda w, x: x @ w[16:80].T),
    Case(8, "several slices", lambda q, x: [x @ part.T for part in _thirds(q.dense())],
         lambda w, x: np.split(x @ w.T, 3, axis=1)),
    Case(8, "a slice and the whole", _slice_and_whole,
         lambda w, x: [x @ w[:8].T, x @ w.T, w[[1, 2]]], ("dequantize", "quantized_matmul", "take"),
         ("matmul",)),
    Case(8, "slice of the transpose", lambda q, x: x @ q.dense().T[..., 16:80],
         lambda w, x: x @ w[16:80].T),
    Case(8, "split of the transpose",
         lambda q, x: [x @ p for p in qg.split(q.dense().T, 3, axis=-1)],
         lambda w, x: np.split(x @ w.T, 3, axis=1)),
    Case(8, "layers of a stack", lambda q, x: x @ q.dense()[0].T + x @ q.dense()[2].T,
         lambda w, x: x @ (w[0] + w[2]).T, w=(3, N, K)),
    Case(8, "concatenate transposed",
         lambda q, x: x @ qg.concatenate([q.dense()[:16].T, q.dense().T], axis=1),
         lambda w, x: x @ np.concatenate([w[:16], w]).T),
    Case(8, "concatenate", _joined, lambda w, x: x @ np.concatenate([w[:16], w[64:]]).T),
    Case(8, "split of a product", lambda q, x: qg.split(x @ q.dense().T, 3, axis=1),
         lambda w, x: np.split(x @ w.T, 3, axis=1), ("quantized_matmul", "split"), noted=1),
    Case(9, "fake quantization", _fake, plain, ("quantize", "quantized_matmul"),
         is_float=True),
    Case(10, "imported", _imported, plain, gone=("matmul", "right_shift", "take"),
         formats=_is_exported),
    Case(11, "cuda: rows not contiguous", _rows_of_packed, lambda w, x: x @ w[::2].T,
         ("quantized_matmul", "contiguous"), target="cuda"),
    Case(11, "metal: unwritten columns", lambda q, x: x @ q.dense(), lambda w, x: x @ w,
         ("dequantize", "matmul"), ("quantized_matmul",), (1024, N), (2, 1024), target="metal",
         formats=lambda form: not form.endswith(("64", "128"))),
]  # fmt: skip


def target(case: Case) -> Target:
    """CUDA and Metal are stood in for by targets of those backends on the CPU."""
    return Target(mx.Device(mx.cpu, 0), case.target, case.target, 2)
