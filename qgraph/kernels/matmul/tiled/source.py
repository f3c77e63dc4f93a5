"""The CUDA sources of `tiled`, as the kernels that MLX compiles of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from ...base import Problem
from ...cuda.kernel import CudaKernel
from ...cuda.source import cuda_source
from .blocks import Block
from .layout import TILE

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
"""In the order of the source."""
SOURCES = (
    "cuda/words",
    *(f"matmul/tiled/{name}" for name in ("instructions", "formats", "product", "experts", "rows")),
)

_PRODUCT = (
    "qgraph::tiled::Product<T, qgraph::tiled::Mode(MODE), BITS, GROUP, WN, WK, COLUMNS, DEPTH, "
    "STAGES>, N"
)


def template(p: Problem, b: Block) -> list[tuple[str, Any]]:
    """What `product` and `gathered_product` are compiled for."""
    return [
        ("T", p.dtype),
        ("MODE", MODES.index(p.mode)),
        ("BITS", p.bits),
        ("GROUP", p.group_size),
        ("N", p.n if p.n % TILE else 0),
        ("WN", b.rows),
        ("WK", b.split),
        ("COLUMNS", b.columns),
        ("DEPTH", b.depth),
        ("STAGES", b.stages),
    ]


@cache
def product(shared_memory: int) -> CudaKernel:
    call = f"product<{_PRODUCT}, PARTS>(x, w, scales, y, x_shape[0], x_shape[1], w_shape[0])"
    return _kernel("tiled", ["x", "w", "scales"], ["y"], call, shared_memory)


@cache
def add_parts() -> CudaKernel:
    call = "add_parts<T>(parts, y, parts_shape[0], size_t(parts_shape[1]) * parts_shape[2])"
    return _kernel("add_parts", ["parts"], ["y"], call)


@cache
def gathered_product(shared_memory: int) -> CudaKernel:
    inputs = ["x", "w", "scales", "starts", "in_x", "in_y"]
    call = (
        f"gathered_product<{_PRODUCT}>(x, w, scales, starts, {{in_x, in_y}}, y, x_shape[1], "
        "w_shape[1], w_shape[0])"
    )
    return _kernel("tiled_gather", inputs, ["y"], call, shared_memory)


@cache
def gathered_rows(shared_memory: int) -> CudaKernel:
    call = f"gathered_rows<{_PRODUCT}>(x, w, scales, rhs, in_x, y, x_shape[1], w_shape[1])"
    inputs = ["x", "w", "scales", "rhs", "in_x"]
    return _kernel("tiled_gather_rows", inputs, ["y"], call, shared_memory)


@cache
def group_rows(shared_memory: int) -> CudaKernel:
    call = "group_rows(lhs, rhs, starts, in_x, in_y, rhs_shape[0], EACH, EXPERTS)"
    return _kernel("group_rows", ["lhs", "rhs"], ["starts", "in_x", "in_y"], call, shared_memory)


@cache
def take_rows(affine: bool) -> CudaKernel:
    outputs = ["w_rows", "s_rows", "b_rows"][: 2 + affine]
    call = (
        "take_rows<qgraph::tiled::Mode(MODE), BITS, GROUP>(w, scales, rows, w_rows, s_rows, "
        f"{outputs[-1]}, N, K)"
    )
    return _kernel("take_rows", ["w", "scales", "rows"], outputs, call)


def _kernel(
    name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, shared_memory: int = 0
) -> CudaKernel:
    return CudaKernel(
        name=f"qgraph_{name}",
        inputs=inputs,
        outputs=outputs,
        header=cuda_source(*SOURCES),
        source=f"qgraph::tiled::{source};",
        shared_memory=shared_memory,
    )
