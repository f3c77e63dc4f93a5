"""The CUDA sources compile, where there is a compiler; on GPUs `tests/gpu` runs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qgraph.kernels.cuda.source import cuda_source
from qgraph.kernels.matmul.tiled.blocks import BLOCKS
from qgraph.kernels.matmul.tiled.source import SOURCES

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

FORMS = {
    "parts": "Product<__nv_bfloat16, AFFINE, 3, 32, 2, 1, 64, 128, 4>, 70, true",
    "halves": "Product<__half, NVFP4, 4, 16, 2, 1, 256, 64, 5>, 0, false",
}
KERNEL = """
extern "C" __global__ void {name}(const {x}* x, const unsigned* w, const void* s, {y}* y, int m,
                                  int k, int tiles) {{
  product<{template}>(x, w, s, y, m, k, tiles);
}}
"""
GATHERED = """
extern "C" __global__ void gathered(const __half* x, const unsigned* w, const void* s, const int* e,
                                    const unsigned* from, const unsigned* to, __half* y, int k) {
  gathered_product<Product<__half, MXFP8, 8, 32, 2, 2, 16, 256, 5>, 0>(x, w, s, e, {from, to}, y,
                                                                       k, 1, 9);
  take_rows<AFFINE, 6, 64>(w, s, e, nullptr, y, y, 5, k);
  group_rows(from, to, nullptr, nullptr, nullptr, k, 1, 9);
  add_parts<__half>(nullptr, y, 2, 3);
}
"""


def products() -> dict[str, str]:
    """Every way of cutting a product up, and other formats."""
    cuts = {}
    for b in BLOCKS:
        numbers = (b.rows, b.split, b.columns, b.depth, b.stages)
        name = "_".join(map(str, ("cut", *numbers)))
        cut = str(numbers)[1:-1]
        cuts[name] = f"Product<__nv_bfloat16, AFFINE, 4, 64, {cut}>, 0, false"
    return cuts | FORMS


def source() -> str:
    text = cuda_source(*SOURCES)
    text += "using namespace qgraph::tiled;\n"
    for name, template in products().items():
        x = template.removeprefix("Product<").split(",")[0]
        y = "float" if template.endswith("true") else x
        text += KERNEL.format(name=name, x=x, y=y, template=template)
    return text + GATHERED


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_products_in_tiles_compile(arch: str, tmp_path: Path) -> None:
    """With no word of the assembler that it makes the tensor cores wait, or that registers lack."""
    (tmp_path / "products.cu").write_text(source())
    made = subprocess.run(
        ["nvcc", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin",
         "-Xptxas", "-v", "-o", tmp_path / "products.cubin", tmp_path / "products.cu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "serialized" not in made.stderr
    assert made.stderr.count("0 bytes spill stores, 0 bytes spill loads") == len(products()) + 1
