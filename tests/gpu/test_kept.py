"""MLX launches the compiled kernels that we put into its cache: skipped without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qgraph.kernels.cuda.kept import folder
from qgraph.kernels.cuda.kernel import CudaKernel
from qgraph.kernels.cuda.nvrtc import compiler
from qgraph.kernels.cuda.text import Template, module_of

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a GPU of NVIDIA's")

SCRIPT = """
import mlx.core as mx
from qgraph.kernels.compiled import Compiled
from qgraph.kernels.cuda.kernel import CudaKernel

mx.set_default_device(mx.gpu)
twice = CudaKernel("twice", ["x"], ["y"], "y[threadIdx.x] = T(float(x[threadIdx.x]) * 2);")

def fn(x):
    return twice(
        inputs=[x], output_dtypes=[x.dtype], output_shapes=[x.shape], template=[("T", x.dtype)],
        grid=(x.size, 1, 1), threadgroup=(x.size, 1, 1),
    )

print(Compiled(fn).call(mx.array([1, 2, 3], mx.bfloat16))[0].tolist())
"""


def run(cache: Path) -> str:
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"MLX_PTX_CACHE_DIR": str(cache)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return made.stdout.strip()


def test_mlx_takes_what_is_kept(tmp_path: Path) -> None:
    """Shown by code that does otherwise than the text under whose name it lies."""
    if compiler() is None:
        pytest.skip("needs NVRTC and CUDA's headers")
    assert run(tmp_path) == "[2.0, 4.0, 6.0]"
    (code,) = tmp_path.glob("custom_kernel_twice_bfloat16_t_*.ptx")
    assert run(tmp_path) == "[2.0, 4.0, 6.0]"
    other = tmp_path / "other"
    other.mkdir()
    thrice = SCRIPT.replace("* 2", "* 3")
    subprocess.run(
        [sys.executable, "-c", thrice], env=os.environ | {"MLX_PTX_CACHE_DIR": str(other)},
        check=True,
    )  # fmt: skip
    (changed,) = other.glob("*.ptx")
    assert changed.name != code.name
    changed.replace(code)
    assert run(tmp_path) == "[3.0, 6.0, 9.0]"


FORMS: list[tuple[list[str], str, list[Any], Template]] = [
    (["x"], "y[0] = x[0];", [mx.zeros(3)], []),
    (["x", "n"], "y[0] = x[n_shape[0]] + x_ndim + B + T(N) + n_shape[0];",
     [mx.zeros((2, 3)), mx.array(1, mx.uint32)], [("T", mx.float16), ("N", -3), ("B", False)]),
    (["x", "n"], "y[0] = x[n[x_strides[1]] + x_shape[0]]; N;",
     [mx.zeros((2, 3), mx.bfloat16), mx.zeros(1, mx.int64)], [("N", mx.uint8), ("B", True)]),
]  # fmt: skip


@pytest.mark.parametrize(("names", "source", "inputs", "template"), FORMS)
def test_texts_are_mlxs(
    names: list[str], source: str, inputs: list[Any], template: Template,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = f"f{len(template)}", names, ["y"], source, "// a header\n"
    kernel = mx.fast.cuda_kernel(
        name=text[0], input_names=names, output_names=["y"], source=source, header=text[4]
    )
    dtype = mx.bfloat16
    kernel(
        inputs=inputs, output_dtypes=[dtype], output_shapes=[(1,)], grid=(1, 1, 1),
        threadgroup=(1, 1, 1), template=template, verbose=True, stream=mx.gpu,
    )  # fmt: skip
    mx.synchronize()
    made = module_of(*text, inputs, [dtype], template)
    printed = capfd.readouterr().out
    assert f"`{made.kernel}`" in printed
    assert f"```\n{made.text}\n```" in printed


def test_the_folder_is_mlxs() -> None:
    """Which has its own kernels there, where one of them was ever compiled."""
    kernel = CudaKernel("folder", ["x"], ["y"], "y[0] = x[0];")
    assert "// for sm_" in kernel._text[4]
    x = mx.random.normal((3, 3))
    mx.eval(mx.compile(lambda x: mx.exp(x) * x + 1, shapeless=False)(x))
    assert any(folder().rglob("*.ptx"))
