"""Compiled CUDA kernels lie where MLX looks for them; a compiler and a GPU are played."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qgraph.kernels.compiled import Compiled
from qgraph.kernels.cuda import kernel as kernels
from qgraph.kernels.cuda.kept import included, is_kept, keep, place
from qgraph.kernels.cuda.kernel import CudaKernel, compiled_together
from qgraph.kernels.cuda.nvrtc import HEADERS, Code, compiler
from qgraph.kernels.cuda.text import Module, module_of

SOURCE = (
    "if (threadIdx.x < x_shape[0]) y[threadIdx.x] = T(float(x[threadIdx.x]) * N * (B ? 1 : 2));"
)
TEXT = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

// mine
namespace mlx::core::cu {

namespace cg = cooperative_groups;

__global__ void custom_kernel_scale_float16_t_3_t(
    const __nv_bfloat16* x,
    const __grid_constant__ Shape x_shape,
    const uint32_t* n,
    __half* y) {
  using T = __half;
  constexpr int N = 3;
  constexpr bool B = true;

""" + SOURCE + """
}

} // namespace mlx::core::cu
"""  # fmt: skip
MODULE = module_of(
    "scale", ["x", "n"], ["y"], SOURCE, "// mine\n",
    [mx.zeros(8, mx.bfloat16), mx.array(1, mx.uint32)], [mx.float16],
    [("T", mx.float16), ("N", 3), ("B", True)],
)  # fmt: skip


class Compiler:
    """Compiles all but kernels called "broken"."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, module: Module, arch: str) -> Code | None:
        self.asked.append(f"{module.kernel} for {arch}")
        return None if "broken" in module.kernel else Code(module.text.encode(), "mangled")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, for what is kept."""
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "ptx"))
    return tmp_path / "ptx"


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A GPU's MLX, whose kernels give their first input."""

    def cuda_kernel(**_: Any) -> Any:
        return lambda *, inputs, **_: [inputs[0]]

    made = Compiler()
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "compiler", lambda: made)
    monkeypatch.setattr(kernels, "compiled_for", lambda: "sm_90a")
    return made


def call(name: str, x: mx.array) -> list[mx.array]:
    kernel = CudaKernel(name, ["x"], ["y"], "y[0] = x[0];")
    return kernel(inputs=[x], output_dtypes=[x.dtype], output_shapes=[x.shape])


def test_the_text_is_mlxs() -> None:
    assert MODULE.text == TEXT
    assert MODULE.entry == "mlx::core::cu::custom_kernel_scale_float16_t_3_t"
    number = MODULE.name.removeprefix("custom_kernel_scale_float16_t_3_t_")
    assert 0 < int(number, 16) < 1 << 64


def test_a_scalar_has_no_shape() -> None:
    module = module_of("f", ["x"], ["y"], "y[0] = x_shape[0];", "", [mx.array(1.0)], [mx.float32])
    assert "Shape" not in module.text


def test_what_is_kept_is_read_back_as_mlx_reads_it(folder: Path) -> None:
    keep(MODULE, Code(b"\x7fELF", "_Z5scale"))
    assert is_kept(MODULE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        f"{MODULE.name}.ptx": b"\x7fELF",
        f"{MODULE.name}.txt": f"{MODULE.entry}\t_Z5scale\n".encode(),
    }


def test_long_names_become_folders(folder: Path) -> None:
    long = Module("k" * 600, "")
    keep(long, Code(b"code", "entry"))
    assert is_kept(long)
    assert place(long.name).parent == folder / ("k" * 245) / ("k" * 245)


def test_where_nothing_can_be_written_nothing_happens(folder: Path) -> None:
    folder.write_text("a file")
    keep(MODULE, Code(b"code", "entry"))
    assert not is_kept(MODULE)


def test_kernels_of_a_program_are_compiled_once(played: Compiler) -> None:
    def fn(x: mx.array) -> list[mx.array]:
        return [*call("one", x), *call("two", x), *call("one", x + 1)]

    for _ in range(2):  # two programs
        program = Compiled(fn)
        program.call(mx.zeros(2))
        program.call(mx.ones(2))
    assert sorted(played.asked) == ["custom_kernel_one for sm_90a", "custom_kernel_two for sm_90a"]
    program.call(mx.zeros(2, mx.float16))
    assert len(played.asked) == 4  # other types are other kernels


def test_inner_programs_wait_for_the_outer(played: Compiler) -> None:
    with compiled_together():
        with compiled_together():
            call("inner", mx.zeros(2))
        assert not played.asked
    assert len(played.asked) == 1


def test_types_alone_compile_nothing(played: Compiler) -> None:
    call("typed", mx.zeros(2))
    assert not played.asked


def test_what_does_not_compile_is_left_to_mlx(played: Compiler, folder: Path) -> None:
    with compiled_together():
        call("broken", mx.zeros(2))
        call("fine", mx.zeros(2))
    assert len(played.asked) == 2
    assert all("fine" in path.name for path in folder.iterdir())


def test_an_error_in_the_program_is_its_own(played: Compiler) -> None:
    def fn(x: mx.array) -> list[mx.array]:
        return [*call("before", x), x / mx.zeros(3)]  # of other lengths

    with pytest.raises(ValueError, match="broadcast"):
        Compiled(fn).call(mx.zeros(2))
    assert not played.asked


def test_a_text_is_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    line = included("y[0] = 1;")
    assert included("y[0] = 1;") == line != included("y[0] = 2;")
    assert Path(line.split('"')[1]).read_text() == "y[0] = 1;"
    (tmp_path / "none").write_text("")
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "none"))  # no folder
    assert included("y[0] = 1;") == "y[0] = 1;"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_headers_that_stand_in_are_enough(tmp_path: Path) -> None:
    config = tmp_path / "mlx/backend/cuda/device/config.h"
    config.parent.mkdir(parents=True)
    config.write_text("#define MAX_NDIM 10\n")
    for name, text in HEADERS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "scale.cu").write_text(MODULE.text)
    flags: Sequence[Any] = ["-std=c++17", "-cubin", "-arch=sm_90", "-I", tmp_path]
    made = subprocess.run(
        ["nvcc", *flags, "-o", tmp_path / "scale.cubin", tmp_path / "scale.cu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr


@pytest.mark.skipif(compiler() is None, reason="needs NVRTC, and MLX for CUDA")
def test_nvrtc_compiles_it() -> None:
    compile = compiler()
    assert compile is not None
    made = compile(MODULE, "sm_90a")
    assert made is not None
    assert made.code.startswith(b"\x7fELF")
    assert "scale" in made.entry
    assert compile(Module("k", "nonsense"), "sm_90a") is None
