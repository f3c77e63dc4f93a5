"""The CUDA source of `tiled`, run by a CPU, against float64; `tests/gpu` runs it on a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph
from qgraph.kernels.matmul.tiled.layout import tiled_scales, tiled_weight
from tests.support.arrays import to_numpy
from tests.support.compiler import loaded, needs_compiler

pytestmark = needs_compiler
HERE = Path(__file__).parent
ROOM = Path(qgraph.__file__).parent / "kernels" / "matmul" / "tiled"


class Given(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in
          ("x", "w", "scales", "y", "starts", "in_x", "in_y")),
        *((name, ctypes.c_int) for name in ("m", "k", "tiles", "experts")),
    ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kernel of `tiled_on_cpu.cpp`, in its order, and sizes that fill neither tile nor stage."""

    mode: str
    bits: int
    group: int
    dtype: mx.Dtype
    rows: int
    split: int
    columns: int
    m: int
    n: int
    k: int
    parts: int = 1


CASES = (
    Case("affine", 4, 64, mx.bfloat16, 1, 2, 8, 5, 128, 1088),
    Case("affine", 4, 64, mx.bfloat16, 1, 2, 8, 9, 64, 2112, parts=3),
    Case("affine", 3, 32, mx.bfloat16, 2, 1, 16, 20, 71, 480),
    Case("affine", 6, 128, mx.bfloat16, 2, 1, 64, 70, 192, 384),
    Case("affine", 5, 32, mx.float16, 1, 2, 32, 31, 64, 608),
    Case("affine", 2, 64, mx.bfloat16, 1, 1, 24, 50, 70, 256),
    Case("affine", 8, 32, mx.float16, 1, 4, 8, 1, 64, 1120),
    Case("mxfp4", 4, 32, mx.bfloat16, 1, 1, 8, 3, 64, 224),
    Case("nvfp4", 4, 16, mx.float16, 1, 2, 8, 8, 64, 272),
    Case("mxfp8", 8, 32, mx.bfloat16, 1, 1, 8, 2, 64, 352),
    Case("nvfp4", 4, 16, mx.bfloat16, 2, 1, 64, 41, 64, 272),
)
TOLERANCE = {mx.bfloat16: 3e-3, mx.float16: 6e-4}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("cuda") / "tiled.cpp"
    path.write_text('#include "tiled_on_cpu.cpp"')
    made = loaded(path, f"-I{HERE}", f"-I{ROOM}")
    made.run.restype = made.take.restype = made.group.restype = ctypes.c_bool
    made.run.argtypes = [Given, *[ctypes.c_int] * 5, ctypes.c_bool]
    made.take.argtypes = made.group.argtypes = [Given, ctypes.c_int]
    made.add.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return made


def operands(case: Case, experts: int = 0) -> tuple[Any, list[mx.array], Any]:
    """x, what is packed in rows, and the weight in float64."""
    shape = (experts, case.n, case.k) if experts else (case.n, case.k)
    settings: Any = {"group_size": case.group, "bits": case.bits, "mode": case.mode}
    x = mx.random.normal((case.m, case.k), key=mx.random.key(case.bits)).astype(case.dtype)
    w = mx.random.normal(shape, key=mx.random.key(1)).astype(case.dtype)
    parts = list(mx.quantize(w, **settings))
    wide = [p.astype(mx.float32) if case.mode == "affine" else p for p in parts[1:]]
    dense = mx.dequantize(parts[0], *wide, **settings, dtype=mx.float32)
    return x, parts, to_numpy(dense).astype(np.float64)


def plain(array: mx.array) -> Any:
    """A contiguous copy; of 16-bit floats their bits."""
    half = array.dtype in (mx.bfloat16, mx.float16)
    return np.ascontiguousarray(np.array(array.view(mx.uint16) if half else array))


def numbers(bits: Any, dtype: mx.Dtype) -> Any:
    return to_numpy(mx.array(bits).view(dtype)).astype(np.float64)


def address(array: Any) -> int:
    return int(array.ctypes.data)


def relative(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("late", [False, True], ids=["copies at once", "copies late"])
@pytest.mark.parametrize(
    "which", range(len(CASES)), ids=lambda i: f"{CASES[i].mode}{CASES[i].bits}"
)
def test_products(library: Any, which: int, late: bool) -> None:
    case = CASES[which]
    x, parts, dense = operands(case)
    want = to_numpy(x).astype(np.float64) @ dense.T
    w = plain(tiled_weight(parts[0], case.bits))
    scales = plain(tiled_scales(parts[1:], case.group))
    size = (case.parts, case.m, case.n)
    held = plain(x)
    y = np.full(size, 7e7, np.float32) if case.parts > 1 else np.full(size, 0x5555, np.uint16)
    given = Given(
        address(held), address(w), address(scales), address(y), None, None, None,
        case.m, case.k, len(w), 0,
    )  # fmt: skip
    grid = (-(-case.m // case.columns), -(-len(w) // case.rows), case.parts)
    assert library.run(given, which, 128 * case.rows * case.split, *grid, late)
    if case.parts > 1:
        assert relative(y.sum(axis=0), want) < TOLERANCE[case.dtype]
        added = np.zeros((case.m, case.n), np.uint16)
        library.add(address(y), address(added), case.parts, added.size)
        y = added[None]
    assert relative(numbers(y[0], case.dtype), want) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("which", [i for i, c in enumerate(CASES) if c.mode != "affine"])
def test_scales_that_are_no_numbers_or_nothing(library: Any, which: int) -> None:
    case = CASES[which]
    x, parts, _ = operands(case)
    nan = 127 if case.mode == "nvfp4" else 255
    parts[1][3, 0], parts[1][4, 1], parts[1][5, 0] = nan, 0, 1
    settings: Any = {"group_size": case.group, "bits": case.bits, "mode": case.mode}
    dense = to_numpy(mx.dequantize(*parts, **settings, dtype=mx.float32)).astype(np.float64)
    w, scales = plain(tiled_weight(parts[0], case.bits)), plain(tiled_scales(parts[1:], case.group))
    held, y = plain(x), np.zeros((case.m, case.n), np.uint16)
    given = Given(
        address(held), address(w), address(scales), address(y), None, None, None,
        case.m, case.k, len(w), 0,
    )  # fmt: skip
    grid = (-(-case.m // case.columns), -(-len(w) // case.rows), 1)
    assert library.run(given, which, 128 * case.rows * case.split, *grid, True)
    with np.errstate(invalid="ignore"):
        got, want = numbers(y, case.dtype), to_numpy(x).astype(np.float64) @ dense.T
    assert np.isnan(want[:, 3]).all()
    assert np.array_equal(np.isnan(got), np.isnan(want))
    sane = ~np.isnan(want)
    assert relative(got[sane], want[sane]) < TOLERANCE[case.dtype]


def test_rows_at_any_address(library: Any) -> None:
    case = CASES[0]
    x, parts, dense = operands(case)
    held = np.concatenate([np.zeros(1, np.uint16), plain(x).ravel()])
    w, scales = plain(tiled_weight(parts[0], 4)), plain(tiled_scales(parts[1:], 64))
    y = np.zeros((case.m, case.n), np.uint16)
    given = Given(
        address(held) + 2, address(w), address(scales), address(y), None, None, None,
        case.m, case.k, len(w), 0,
    )  # fmt: skip
    assert library.run(given, 0, 256, 1, 2, 1, True)
    assert relative(numbers(y, case.dtype), to_numpy(x).astype(np.float64) @ dense.T) < 3e-3


@pytest.mark.parametrize("experts", [3, 40])
def test_rows_of_experts_are_read_and_written_where_they_lie(library: Any, experts: int) -> None:
    case = Case("affine", 8, 64, mx.bfloat16, 2, 2, 16, m=60, n=70, k=320)
    x, parts, dense = operands(case, experts)
    rng = np.random.default_rng(experts)
    rhs = np.sort(rng.integers(0, experts, case.m)) if experts > 3 else np.repeat([0, 2], 30)
    in_x, in_y = (rng.permutation(case.m).astype(np.uint32) for _ in range(2))
    starts = np.searchsorted(rhs, np.arange(experts + 1)).astype(np.int32)
    w, scales = plain(tiled_weight(parts[0], 8)), plain(tiled_scales(parts[1:], 64))
    held, y = plain(x), np.zeros((case.m, case.n), np.uint16)
    given = Given(
        *map(address, (held, w, scales, y, starts, in_x, in_y)), case.m, case.k, w.shape[1], experts
    )
    blocks = -(-case.m // 16) + min(case.m, experts)
    assert library.run(given, len(CASES), 512, blocks, 1, 1, True)
    want = np.empty((case.m, case.n))
    want[in_y] = np.einsum("rk,rnk->rn", to_numpy(x).astype(np.float64)[in_x], dense[rhs])
    assert relative(numbers(y, case.dtype), want) < 3e-3


def test_few_rows_need_no_grouping(library: Any) -> None:
    case = Case("affine", 8, 64, mx.bfloat16, 2, 2, 16, m=6, n=70, k=320)
    x, parts, dense = operands(case, 5)
    in_x, rhs = np.array([3, 3, 0, 5, 1, 2], np.uint32), np.array([4, 0, 2, 2, 4, 1], np.uint32)
    w, scales = plain(tiled_weight(parts[0], 8)), plain(tiled_scales(parts[1:], 64))
    held, y = plain(x), np.zeros((case.m, case.n), np.uint16)
    given = Given(
        *map(address, (held, w, scales, y)), None, address(in_x), address(rhs), case.m, case.k,
        w.shape[1], 5,
    )  # fmt: skip
    assert library.run(given, len(CASES) + 1, 512, case.m, 1, 1, True)
    want = np.einsum("rk,rnk->rn", to_numpy(x).astype(np.float64)[in_x], dense[rhs])
    assert relative(numbers(y, case.dtype), want) < 3e-3


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize(("experts", "matrices"), [(1, 5), (8, 300), (70, 64)])
def test_rows_are_grouped_by_expert(library: Any, experts: int, matrices: int, each: int) -> None:
    rng = np.random.default_rng(matrices)
    lhs = rng.integers(0, 9, matrices).astype(np.uint32)
    rhs = rng.integers(0, experts, matrices).astype(np.uint32)
    starts = np.zeros(experts + 1, np.int32)
    in_x, in_y = (np.zeros(matrices * each, np.uint32) for _ in range(2))
    given = Given(
        address(lhs), address(rhs), None, None, *map(address, (starts, in_x, in_y)), matrices, 0, 0,
        experts,
    )  # fmt: skip
    assert library.group(given, each)
    counts = np.bincount(rhs, minlength=experts) * each
    assert starts.tolist() == [0, *np.cumsum(counts)]
    assert sorted(in_y) == list(range(matrices * each))
    assert (np.diff(rhs[in_y // each].astype(int)) >= 0).all()
    assert (in_x == lhs[in_y // each] * each + in_y % each).all()


FORMATS = [(2, 64), (3, 32), (4, 64), (5, 32), (6, 128), (8, 32), (4, 16)]


@pytest.mark.parametrize("which", range(len(FORMATS)), ids=lambda i: f"{FORMATS[i]}")
def test_rows_are_taken(library: Any, which: int) -> None:
    bits, group = FORMATS[which]
    mode = "nvfp4" if group == 16 else "affine"
    n, k = 150, 2176 if mode == "affine" else 2192  # more than one block reads a row
    w = mx.random.normal((n, k), key=mx.random.key(which)).astype(mx.float16)
    parts = list(mx.quantize(w, bits=bits, group_size=group, mode=mode))
    asked = np.array([0, 149, -1, -150, 64, 7], np.int32)
    want = [plain(part[mx.array(asked)]) for part in parts]
    got = [np.zeros_like(part) for part in want]
    tiles, scales = plain(tiled_weight(parts[0], bits)), plain(tiled_scales(parts[1:], group))
    outputs = [*map(address, got), None][:3]
    given = Given(
        None, address(tiles), address(scales), outputs[0], address(asked), *outputs[1:], n, k, 0,
        len(asked),
    )  # fmt: skip
    assert library.take(given, which)
    for mine, theirs in zip(got, want, strict=True):
        assert np.array_equal(mine, theirs)
