"""The CUDA source of attention, run by a CPU, against float64; `tests/gpu` runs it on a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qgraph
from tests.compiler import needs_compiler

pytestmark = needs_compiler
HERE = Path(__file__).parent
SOURCE = Path(qgraph.__file__).parent / "kernels" / "attention" / "decode_attention.cuh"
DIM = 64


class Given(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in
          ("q", "k", "v", "keys", "values", "freqs", "place", "last", "y", "parts", "new_keys",
           "new_values")),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads", "length")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cuda")
    for name in ("cuda_bf16.h", "cuda_fp16.h"):
        (folder / name).touch()
    library = folder / "attention.so"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{folder}", f'-DSOURCE="{SOURCE}"',
         "-o", library, HERE / "attention_on_cpu.cpp"], check=True,
    )  # fmt: skip
    function = ctypes.CDLL(str(library)).attention
    function.restype = ctypes.c_bool
    function.argtypes = [Given, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_bool]
    return function


def operands(batch: int, heads: int, kv_heads: int, length: int) -> list[Any]:
    rng = np.random.default_rng(length)
    shapes = [(batch, h, DIM) for h in (heads, kv_heads, kv_heads)]
    shapes += [(batch, kv_heads, length, DIM)] * 2
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def by_kernel(
    attention: Any, arrays: list[Any], position: int, last: int, splits: int, dims: int = 0,
    traditional: bool = False, skip: int = 0,
) -> list[Any]:  # fmt: skip
    """Result and caches; all arrays begin `skip` numbers into a buffer."""
    held = [np.concatenate([np.zeros(skip, np.float32), a.ravel()]) for a in arrays]
    q, k, v, keys, values = (a.ctypes.data + 4 * skip for a in held)
    batch, heads, _ = arrays[0].shape
    _, kv_heads, length, _ = arrays[3].shape
    y = np.full((batch, heads, DIM), 7e7, np.float32)
    parts = np.full((batch * heads * splits, DIM + 2), 7e7, np.float32)
    after = [np.full_like(arrays[3], 7e7) for _ in "kv"]
    place, seen = np.array([position], np.int32), np.array([last], np.int32)
    given = Given(
        q, k, v, keys, values, None, place.ctypes.data, seen.ctypes.data, y.ctypes.data,
        parts.ctypes.data, *(a.ctypes.data for a in after), heads, kv_heads, length,
    )  # fmt: skip
    assert attention(given, batch, splits, dims, traditional), "threads wait for one another"
    return [y, *after]


def rotate(x: Any, position: int, dims: int, traditional: bool) -> Any:
    """By the formula of RoFormer (arXiv 2104.09864)."""
    half, y = dims // 2, x.copy()
    angle = position * 1e4 ** -(np.arange(half) / max(1, half))
    first = 2 * np.arange(half) if traditional else np.arange(half)
    second = first + (1 if traditional else half)
    y[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    y[..., second] = x[..., first] * np.sin(angle) + x[..., second] * np.cos(angle)
    return y


def in_float64(
    arrays: list[Any], position: int, last: int, dims: int = 0, traditional: bool = False
) -> list[Any]:
    q, k, v, keys, values = (a.astype(np.float64) for a in arrays)
    q, k = (rotate(a, position, dims, traditional) for a in (q, k))
    length, group = keys.shape[2], q.shape[1] // keys.shape[1]
    if 0 <= position < length:
        keys[:, :, position], values[:, :, position] = k, v
    seen, scale = (last + 1, 0.125) if last >= 0 else (length, 0.0)
    some_keys, some_values = (np.repeat(a[:, :, :seen], group, axis=1) for a in (keys, values))
    with np.errstate(invalid="ignore"):
        scores = scale * np.einsum("bhd,bhld->bhl", q, some_keys)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("bhl,bhld->bhd", p / p.sum(-1, keepdims=True), some_values)
    return [y, keys, values]


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("length", [1, 33, 300])
@pytest.mark.parametrize(("dims", "traditional"), [(0, False), (64, False), (32, True)])
def test_numbers(attention: Any, splits: int, length: int, dims: int, traditional: bool) -> None:
    arrays = operands(2, 4, 2, length)
    for position, last in ((length // 2, length // 2), (length - 1, length), (length, -1)):
        got = by_kernel(attention, arrays, position, last, splits, dims, traditional)
        for ours, want in zip(got, in_float64(arrays, position, last, dims, traditional),
                              strict=True):  # fmt: skip
            np.testing.assert_allclose(ours, want, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("splits", [1, 5])
def test_arrays_at_any_address(attention: Any, splits: int) -> None:
    arrays = operands(1, 4, 2, 90)
    for skip in (1, 3):
        got = by_kernel(attention, arrays, 40, 40, splits, skip=skip)
        for ours, want in zip(got, in_float64(arrays, 40, 40), strict=True):
            np.testing.assert_allclose(ours, want, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("position", [0, 9, 299])
def test_infinities_and_nan(attention: Any, splits: int, position: int) -> None:
    arrays = operands(1, 2, 1, 300)
    q, k, v, keys, values = arrays
    token = k.copy()
    token[0, 0, 3] = np.nan
    (y, *_) = by_kernel(attention, [q, token, v, keys, values], position, position, splits)
    assert np.isnan(y).all()
    infinite = v.copy()
    infinite[0, 0, 5] = np.inf
    (y, *_) = by_kernel(attention, [q, k, infinite, keys, values], position, position, splits)
    assert np.isinf(y[..., 5]).all()
    assert np.isfinite(np.delete(y, 5, axis=-1)).all()
    unseen = keys.copy()
    unseen[:, :, position + 1 :] = np.nan
    (y, *_) = by_kernel(attention, [q, k, v, unseen, values], position, position, splits)
    np.testing.assert_allclose(y, in_float64(arrays, position, position)[0], rtol=1e-4, atol=5e-5)
