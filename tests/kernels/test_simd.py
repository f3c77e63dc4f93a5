"""Our own CPU kernel: formats and odd shapes against float64; with and without a compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.kernels import Problem, kernel, refusal
from qgraph.kernels.cpu import library as cpu_library
from qgraph.kernels.matmul.formats import values
from qgraph.kernels.streams import Streams
from qgraph.target import as_target
from tests.support import reference
from tests.support.arrays import to_numpy
from tests.support.compiler import forget_builds, needs_compiler
from tests.support.passes import passes_without

CPU = as_target("cpu")
FORMATS = [("affine", b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
FORMATS += [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]


def problem(x: mx.array, parts: Any, mode: str, bits: int, group: int) -> Problem:
    return Problem.of(x, parts, target=CPU, group_size=group, bits=bits, mode=mode)


def product(x: mx.array, parts: Any, mode: str, bits: int, group: int) -> mx.array:
    found = problem(x, parts, mode, bits, group)
    return kernel("simd").bind(parts, found, Streams(CPU.device))(x)


def exactly(x: mx.array, parts: Any, mode: str, bits: int, group: int) -> Any:
    arrays = [np.array(p) if p.dtype == mx.uint32 else to_numpy(p) for p in parts]
    w = reference.dequantize(*arrays, bits=bits, group_size=group, mode=mode)
    return to_numpy(x).astype(np.float64) @ np.asarray(w, np.float64).T


@needs_compiler
@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS, ids=lambda v: str(v))
def test_formats_and_odd_shapes(mode: str, bits: int, group: int) -> None:
    """Rows of w beyond a multiple of four and sixteen, of x beyond four, K beyond whole blocks."""
    for n, k in ((1, 128), (5, 384), (67, 640), (18, 2176)):
        parts = mx.quantize(
            mx.random.normal((n, k), key=mx.random.key(n)), group_size=group, bits=bits, mode=mode
        )
        for m in (1, 3, 4, 10):
            x = mx.random.normal((m, k), key=mx.random.key(m))
            y = product(x, parts, mode, bits, group)
            assert (y.shape, y.dtype) == ((m, n), mx.float32)
            want = exactly(x, parts, mode, bits, group)
            assert reference.relative_error(to_numpy(y), want) < 2e-6


@needs_compiler
def test_many_rows_are_taken_in_slabs() -> None:
    parts = mx.quantize(mx.random.normal((40, 192), key=mx.random.key(1)))
    for m in (511, 512, 513, 1500):
        x = mx.random.normal((m, 192), key=mx.random.key(m))
        want = exactly(x, parts, "affine", 4, 64)
        y = to_numpy(product(x, parts, "affine", 4, 64))
        assert reference.relative_error(y, want) < 2e-6
        assert reference.relative_error(y[-1], want[-1]) < 2e-6


@needs_compiler
@pytest.mark.parametrize("scales", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_scales_and_rows_in_half_precision(scales: mx.Dtype, dtype: mx.Dtype) -> None:
    parts = mx.quantize(mx.random.normal((48, 256), scales, key=mx.random.key(1)))
    x = mx.random.normal((3, 256), dtype, key=mx.random.key(2))
    y = product(x, parts, "affine", 4, 64)
    assert y.dtype == problem(x, parts, "affine", 4, 64).out_dtype
    rounding = {mx.float32: 2e-6, mx.float16: 5e-4, mx.bfloat16: 4e-3}[y.dtype]
    assert reference.relative_error(to_numpy(y), exactly(x, parts, "affine", 4, 64)) < rounding


@needs_compiler
@pytest.mark.parametrize("scales", [mx.float16, mx.bfloat16])
def test_every_half_precision_scale(scales: mx.Dtype) -> None:
    """Denormals, infinities and NaN too: each of the 65,536, as MLX widens it."""
    every = mx.arange(1 << 16, dtype=mx.uint32).astype(mx.uint16).view(scales).reshape(-1, 1)
    codes = mx.full((1 << 16, 4), 0x11111111, mx.uint32)  # ones
    x = mx.array([[1.0] + [0.0] * 31])
    wide = every.astype(mx.float32)
    y = product(x, (codes, every, mx.zeros_like(every)), "affine", 4, 32)
    mine, mlx = np.array(y)[0], np.array(wide)[:, 0]
    finite = np.isfinite(mlx)
    near = np.abs(mlx) < 2.0**124  # half the codes times a larger scale is infinite
    np.testing.assert_array_equal(mine[near], mlx[near])
    assert not np.isfinite(mine[~finite]).any()


@needs_compiler
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_code_of_the_float_formats(mode: str) -> None:
    bits, group = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
    each = 32 // bits
    codes = np.arange(2**bits, dtype=np.uint32)[:, None] * (np.ones((1, 32 // each), np.uint32))
    words = sum(codes << (bits * i) for i in range(each)).astype(np.uint32)
    one = {"mxfp4": 127, "mxfp8": 127, "nvfp4": 0x38}[mode]
    scales = mx.full((2**bits, 32 // group), one, mx.uint8)
    x = mx.array([[0.0] * 5 + [1.0] + [0.0] * 26])
    y = np.array(product(x, (mx.array(words), scales), mode, bits, group))[0]
    np.testing.assert_array_equal(y, values(mode, bits))


@needs_compiler
def test_rows_that_are_not_contiguous_and_more_axes() -> None:
    parts = mx.quantize(mx.random.normal((48, 256), key=mx.random.key(1)))
    x = mx.random.normal((256, 3, 2), key=mx.random.key(2)).transpose(2, 1, 0)
    y = product(x, parts, "affine", 4, 64)
    assert y.shape == (2, 3, 48)
    want = exactly(x.reshape(6, 256), parts, "affine", 4, 64).reshape(2, 3, 48)
    assert reference.relative_error(to_numpy(y), want) < 2e-6


@needs_compiler
def test_infinities_and_nan_pass_through() -> None:
    parts = mx.quantize(mx.random.normal((8, 64), key=mx.random.key(1)))
    x = mx.ones((2, 64)).at[0, 3].add(float("nan"))
    y = to_numpy(product(x, parts, "affine", 4, 64))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


def test_refusals() -> None:
    x, parts = mx.ones((1, 64)), mx.quantize(mx.ones((64, 64)))
    found = problem(x, parts, "affine", 4, 64)
    assert "columns" in str(refusal("simd", found.replace(transpose=False)))
    assert "GPU" in str(refusal("simd", found.replace(backend="cuda")))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing built, nothing remembered, an empty cache folder."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    forget_builds()
    yield tmp_path
    forget_builds()


PARTS = mx.quantize(mx.random.normal((64, 64), key=mx.random.key(3)))
ROWS = mx.random.normal((2, 64), key=mx.random.key(4))


@needs_compiler
def test_it_is_built_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "FLAGS", (*cpu_library.FLAGS, "-O0"))  # half the time
    product(ROWS, PARTS, "affine", 4, 64)
    (built,) = fresh.rglob("*.so")
    assert list(built.parent.iterdir()) == [built]
    cpu_library.library.cache_clear()
    monkeypatch.setattr(cpu_library, "COMPILER", "no-such-compiler")
    y = product(ROWS, PARTS, "affine", 4, 64)
    assert reference.relative_error(to_numpy(y), exactly(ROWS, PARTS, "affine", 4, 64)) < 2e-6


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_working_compiler_blas_stands_in(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setattr(cpu_library, "COMPILER", compiler)
    with pytest.warns(UserWarning, match="could not be built .* stand in"):
        y = product(ROWS, PARTS, "affine", 4, 64)
    assert reference.relative_error(to_numpy(y), exactly(ROWS, PARTS, "affine", 4, 64)) < 2e-6


def test_without_a_compiler_it_is_not_chosen(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    w = mx.quantize(mx.random.normal((2048, 2048)))
    plan = qg.optimize(
        qg.trace(lambda x: qg.quantized_matmul(x, *w), qg.spec((1, 2048))), target="cpu"
    )
    assert "simd" not in {n.kernel for n in plan.graph.nodes}
    assert "g++" in str(refusal("simd", problem(ROWS, PARTS, "affine", 4, 64)))


@needs_compiler
def test_a_cache_folder_that_cannot_be_written(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = cpu_library._built()
    fresh: Path = request.getfixturevalue("fresh")

    def compiled(texts: Any, folder: Path) -> Path:  # it is not the compiler that is tested here
        return Path(shutil.copy(built, folder / "kernels.so"))

    monkeypatch.setattr(cpu_library, "_compiled", compiled)
    (fresh / "qgraph").write_text("a file where the folder should be")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = product(ROWS, PARTS, "affine", 4, 64)
    assert reference.relative_error(to_numpy(y), exactly(ROWS, PARTS, "affine", 4, 64)) < 2e-6


@needs_compiler
def test_many_threads_at_once() -> None:
    """One of them has the pool, the others work alone."""
    w = mx.quantize(mx.random.normal((512, 512), key=mx.random.key(3)))
    program = qg.compile(
        lambda x: qg.quantized_matmul(x, *w), qg.spec((3, 512)), target="cpu",
        passes=passes_without("form-regions"),
    )  # fmt: skip
    assert [n.kernel for n in program.plan.graph.nodes if n.kernel] == ["simd"]
    xs = [mx.random.normal((3, 512), key=mx.random.key(i)) for i in range(6)]
    mx.eval(xs)
    wrong: list[int] = []

    def call(number: int) -> None:
        want = exactly(xs[number], w, "affine", 4, 64)
        for _ in range(40):
            if reference.relative_error(to_numpy(program(xs[number])), want) > 2e-6:
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


FORK = """
import os, numpy as np, mlx.core as mx
from qgraph.kernels import Problem, kernel
w = mx.quantize(mx.ones((512, 512)))
problem = Problem(1, 512, 512, mx.float32, "affine", 4, 64, cores=2)
product = kernel("simd").product(kernel("simd").parts(w), problem)
x = np.ones((1, 512), np.float32)
before = product(x)
child = os.fork()
if not child:
    os._exit(0 if np.array_equal(product(x), before) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert np.array_equal(product(x), before)
print("both")
"""


@needs_compiler
def test_a_child_after_fork_has_threads_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "both\n", done.stderr
