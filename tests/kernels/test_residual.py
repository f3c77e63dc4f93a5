"""A residual and its norm in one launch: the very source, run by a CPU, against float64."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qgraph.runtime.regions.cuda.expressions import TYPES, literal
from qgraph.runtime.regions.cuda.residual import warps_of
from tests.kernels.grid_on_cpu import HERE, ROOM, aligned
from tests.support.arrays import to_numpy
from tests.support.compiler import loaded
from tests.support.faults import planted

EPS, ROWS = 1e-5, 3
MAIN = """
#include "grid_on_cpu.hpp"
#include "{room}/matmul/tiled/formats.cuh"
#include "{room}/cuda/numbers.cuh"
{residual}
void** given;

void kernel_of_residual() {{
  using T = {type};
  qgraph::phases::add_norm<T, {width}, {chunks}, {warps}>(
      static_cast<const T*>(given[0]), static_cast<const T*>(given[1]),
      static_cast<const T*>(given[2]), static_cast<T*>(given[3]), static_cast<T*>(given[4]),
      {eps}, reinterpret_cast<float*>(qgraph::phases::block_memory()));
}}

extern "C" bool run(void** arrays, bool backwards) {{
  given = arrays;
  qgraph::phases::prepare({rows}, 32 * {warps}, 64, false);
  return launch(kernel_of_residual, {{{rows}, 1, 1}}, 32 * {warps}, {rows}, backwards);
}}
"""


def bits(array: mx.array) -> Any:
    return aligned(np.array(array.view(mx.uint16 if array.itemsize == 2 else mx.uint32)))


def error(
    dtype: mx.Dtype, width: int, folder: Path, change: Any = str, at: int = 0, eps: float = EPS
) -> float:
    """The larger of the sum's and the norm's, in both orders of blocks.

    Args:
        at: numbers before the first, so that rows begin where 16 bytes cannot be read.
    """
    warps, chunks = warps_of(width * dtype.size)
    text = MAIN.format(
        room=ROOM, type=TYPES[dtype], width=width, chunks=chunks, warps=warps, eps=literal(eps),
        rows=ROWS, residual=(ROOM / "cuda" / "residual.cuh").read_text(),
    )  # fmt: skip
    (folder / "residual.cpp").write_text(change(text))
    run: Any = loaded(folder / "residual.cpp", f"-I{HERE}").run
    run.restype = ctypes.c_bool

    mx.random.seed(5)
    x, h = (mx.random.normal((ROWS * width + at,)).astype(dtype) for _ in range(2))
    weight = mx.random.uniform(0.5, 1.5, (width,)).astype(dtype)
    sum = to_numpy((h + x)[at:]).reshape(ROWS, width)
    norm = sum / np.sqrt((sum * sum).mean(-1, keepdims=True) + eps) * to_numpy(weight)
    errors = []
    for backwards in (False, True):
        arrays = [bits(x), bits(h), bits(weight), *(aligned(np.zeros_like(bits(x))) for _ in "ab")]
        starts = [a.ctypes.data + at * dtype.size * (i < 2) for i, a in enumerate(arrays)]
        if not run((ctypes.c_void_p * 5)(*starts), backwards):
            return float("inf")
        for made, wanted in zip(arrays[3:], (sum, norm), strict=True):
            found = to_numpy(mx.array(made[: ROWS * width]).view(dtype)).reshape(ROWS, width)
            errors.append(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    return float(np.max(errors))  # no number if one of them is none


@pytest.mark.parametrize("width", [8, 64, 520, 1024, 4096, 5120])
def test_numbers(width: int, tmp_path: Path) -> None:
    """One warp a row to sixteen, whole ones and not, several turns."""
    assert error(mx.bfloat16, width, tmp_path) < 4e-3


@pytest.mark.parametrize(("dtype", "limit"), [(mx.float16, 5e-4), (mx.float32, 1e-6)])
def test_other_types(dtype: mx.Dtype, limit: float, tmp_path: Path) -> None:
    assert error(dtype, 1536, tmp_path) < limit


def test_an_eps_that_is_an_integer(tmp_path: Path) -> None:
    assert error(mx.bfloat16, 64, tmp_path, eps=0) < 4e-3


def test_rows_that_begin_anywhere(tmp_path: Path) -> None:
    assert error(mx.bfloat16, 64, tmp_path, at=3) < 4e-3


FAULTS = {
    "sums of warps that are read before they are there": ("    __syncthreads();\n", ""),
    "a warp's own sum": ("squares += scratch[i]", "squares = scratch[i]"),
    "a row of others": ("size_t(blockIdx.x) * N", "0"),
    "the same columns in each turn": ("(c * 32 * WIDE + ", "("),
    "no residual": ("residual.v[e] + one.v[e]", "one.v[e]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    assert not error(mx.bfloat16, 5120, tmp_path, planted(*FAULTS[fault])) < 4e-3
