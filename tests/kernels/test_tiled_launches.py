"""What `tiled` has MLX compile does compile: names, order and types of arguments, templates.

MLX itself refuses to make CUDA kernels where there is no GPU; a stand-in keeps what it is given.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qgraph.kernels import Problem, kernel
from qgraph.kernels.choice.measuring import random_operands
from qgraph.kernels.matmul.tiled import source as tiled_source
from qgraph.kernels.streams import Streams

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

CPU = Streams(mx.Device(mx.cpu, 0))
TYPES = {
    mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.float32: "float",
    mx.uint8: "unsigned char", mx.uint32: "unsigned", mx.int32: "int",
}  # fmt: skip
SHAPE = (
    "struct Shape { int sizes[8]; __device__ int operator[](int i) const { return sizes[i]; } };"
)


class Launches:
    """Stands for `mx.fast.cuda_kernel`: `text` has a kernel for each launch, as MLX writes it."""

    def __init__(self) -> None:
        self.header = ""
        self.kernels: dict[str, str] = {}

    def __call__(
        self, *, name: str, input_names: list[str], output_names: list[str], source: str,
        header: str, shared_memory: int,
    ) -> Callable[..., list[mx.array]]:  # fmt: skip
        self.header = header

        def launch(
            *, inputs: list[mx.array], template: list[tuple[str, Any]], output_shapes: list[Any],
            output_dtypes: list[mx.Dtype], **_: object,
        ) -> list[mx.array]:  # fmt: skip
            arguments = []
            for given, array in zip(input_names, inputs, strict=True):
                arguments.append(f"const {TYPES[array.dtype]}* {given}")
                if f"{given}_shape" in source:
                    arguments.append(f"const __grid_constant__ Shape {given}_shape")
            made = zip(output_names, output_dtypes, strict=True)
            arguments += [f"{TYPES[dtype]}* {given}" for given, dtype in made]
            body = "".join(f"  {_constant(*each)}\n" for each in template) + source
            own = f"{name}_{len(self.kernels)}"
            head = f"__global__ void {own}({', '.join(arguments)})"
            self.kernels[own] = f"{head} {{\n{body}\n}}\n"
            return [mx.zeros(*each) for each in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    @property
    def text(self) -> str:
        inside = "".join(self.kernels.values())
        return f"{self.header}\nnamespace mlx {{\n{SHAPE}\n{inside}}}\n"


def _constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {TYPES[value]};"
    kind = "bool" if isinstance(value, bool) else "int"
    return f"constexpr {kind} {name} = {str(value).lower()};"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    made = Launches()
    monkeypatch.setattr(mx.fast, "cuda_kernel", made)
    _forget_kernels()
    yield made
    _forget_kernels()


def _forget_kernels() -> None:
    for function in vars(tiled_source).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_launches_compile(arch: str, launches: Launches, tmp_path: Path) -> None:
    p = Problem(5, 200, 640, mx.bfloat16, "affine", 4, 64, backend="cuda", arch="sm_90")
    for each in (p, p.replace(m=64, n=192, k=9216), p.replace(m=300, n=128)):
        x, parts = random_operands(each)
        packed = kernel("tiled").pack(parts, each)
        kernel("tiled").run(x, packed, each, CPU)
    kernel("tiled").take_rows(packed, mx.array([1, 2]), p)
    p = p.replace(mode="nvfp4", group_size=16, scales_dtype=mx.uint8, experts=5)
    for rows in (4, 64):
        each = p.replace(m=rows)
        x, parts = random_operands(each)
        chosen: Any = kernel("group+tiled")
        indices = mx.zeros((rows,), mx.uint32)
        chosen.run(x[:, None], chosen.pack(parts, each), each, CPU, None, indices)
    kinds = {name.rpartition("_")[0] for name in launches.kernels}
    assert kinds == {
        f"qgraph_{name}"
        for name in ("tiled", "add_parts", "take_rows", "tiled_gather", "tiled_gather_rows",
                     "group_rows")
    }  # fmt: skip
    (tmp_path / "launches.cu").write_text(launches.text)
    made = subprocess.run(
        ["nvcc", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin",
         "-o", tmp_path / "launches.cubin", tmp_path / "launches.cu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
