"""How attention is cut into blocks of a GPU, and the text that hands arrays to its CUDA sources."""

from __future__ import annotations

import struct
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from ..cuda.kernel import CudaKernel
from ..cuda.source import cuda_source

HEAD_DIMS = (64, 128, 192, 256)
WARPS = 8
BLOCKS = 132
"""The processors of an H100: with more blocks the registers of a block keep some waiting."""
SHARE = 128
"""Keys that a block gets at least, where several share a key head."""
ALONE = 256
"""Keys up to which one block reads them all: joining several takes 2 µs."""

only_mlx: ContextVar[bool] = ContextVar("only_mlx", default=False)
"""Set where MLX transforms a graph: it knows no gradient of kernels written for CUDA."""


def on_cuda() -> bool:
    """Do kernels for CUDA run on the default device?"""
    on_gpu = mx.default_device().type == mx.gpu and mx.cuda.is_available()
    return bool(on_gpu) and not only_mlx.get()


def bits_of(number: float) -> int:
    """The bits of a float32 as an int, as templates take no floats."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


def as_position(x: mx.array, length: int) -> mx.array:
    """An integer as int32, to which kernels compare positions: below 0 and beyond stay so.

    >>> [as_position(mx.array(x, mx.int64), 12).item() for x in (-(2**40), 5, 2**40)]
    [-1, 5, 12]
    """
    if x.dtype == mx.int32:
        return x
    first, end = mx.array(0, mx.int32), mx.array(length, mx.int32)
    return mx.where(x >= end, end, mx.where(x < first, first - 1, x.astype(mx.int32)))


class Cut(NamedTuple):
    """How the work is cut.

    Attributes:
        tiles: of eight rows each, that a task takes at once.
        tasks: blocks, but for splits.
        splits: among how many blocks the keys are shared.
    """

    tiles: int
    tasks: int
    splits: int

    @staticmethod
    def of(batch: int, kv_heads: int, rows: int, dim: int, length: int) -> Cut:
        """For so many rows (queries of all heads that share a key) of each key head.

        >>> Cut.of(1, 8, 4, 128, 256), Cut.of(1, 8, 4, 128, 16384)
        (Cut(tiles=1, tasks=8, splits=1), Cut(tiles=1, tasks=8, splits=16))
        >>> Cut.of(4, 8, 32, 128, 4096), Cut.of(1, 1, 8, 64, 1000)
        (Cut(tiles=2, tasks=64, splits=2), Cut(tiles=1, tasks=1, splits=8))
        """
        tiles = 1 if rows <= 8 or dim > 128 else 2
        tasks = batch * kv_heads * -(-rows // (8 * tiles))
        if length <= ALONE:
            return Cut(tiles, tasks, 1)
        return Cut(tiles, tasks, max(1, min(BLOCKS // tasks, -(-length // SHARE))))

    @property
    def template(self) -> list[tuple[str, int]]:
        return [("TILES", self.tiles), ("WARPS", WARPS)]

    @property
    def grid(self) -> dict[str, tuple[int, int, int]]:
        """Threads in all and of a block."""
        block = 32 * WARPS
        return {"grid": (self.tasks * self.splits * block, 1, 1), "threadgroup": (block, 1, 1)}


PARTS = ("attention_instructions", "attention_call", "attention_warp", "decode_attention")
"""What every attention includes."""


@cache
def sources(*names: str) -> str:
    """The CUDA sources of attention as a header."""
    return cuda_source("cuda/words", *(f"attention/{name}" for name in (*PARTS, *names)))


def call_text(
    *, q: str, keys: str, values: str, alone: bool, steps: str = "", last: str = "",
    first: str = "", mask: str = "", sinks: str = "",
) -> str:  # fmt: skip
    """A form `F` and its `call`, of arrays by their names in a kernel; `out` is its first output.

    Args:
        alone: is there one block for all keys, that writes the result and not parts of it?
        steps: elements of q between batches, heads and queries.
    """
    by = ["0ll"] * 4
    if mask:
        tails = [f"1ll * {mask}_shape[1] * ", f"1ll * {mask}_shape[2] * ", "1ll * ", "1ll"]
        tails[0] += f"{mask}_shape[2] * {mask}_shape[3]"
        tails[1] += f"{mask}_shape[3]"
        tails[2] += f"{mask}_shape[3]"
        by = [f"{mask}_shape[{i}] == 1 ? 0ll : {tail}" for i, tail in enumerate(tails)]
    one = [f"{name}_shape[0] > 1" if name else "0" for name in (last, first)]
    arguments = [
        q, steps or "HEADS * QUERIES * D, QUERIES * D, D", keys, values,
        "HEADS", f"{keys}_shape[1]", "QUERIES", f"{keys}_shape[2]",
        f"int(gridDim.x) / ({keys}_shape[0] * {keys}_shape[1] * row_tiles)",
        "__int_as_float(SCALE)", last or "nullptr", first or "nullptr", *one, "WINDOW",
        mask or "nullptr", *by, sinks or "nullptr", "nullptr, out" if alone else "out, nullptr",
    ]  # fmt: skip
    return (
        f"const int row_tiles = (HEADS / {keys}_shape[1] * QUERIES + F::ROWS - 1) / F::ROWS;\n"
        f"const qgraph::Call<T> call{{{', '.join(arguments)}}};\n"
    )


def part_shape(shape: tuple[int, ...], splits: int) -> tuple[int, ...]:
    """Of what blocks write for results of a shape (batch, heads, queries, dim)."""
    batch, heads, queries, dim = shape
    return shape if splits == 1 else (batch * heads * queries, splits, dim + 2)


def part_dtype(dtype: mx.Dtype, splits: int) -> mx.Dtype:
    return dtype if splits == 1 else mx.float32


def join_splits(
    parts: mx.array, shape: tuple[int, ...], dtype: mx.Dtype, splits: int,
    sinks: mx.array | None = None,
) -> mx.array:  # fmt: skip
    """The result, of a shape, of what several blocks a row have written."""
    if splits == 1:
        return parts
    _, heads, queries, dim = shape
    results: list[mx.array] = _joining(sinks is not None)(
        inputs=[parts] if sinks is None else [parts, sinks],
        template=[("T", dtype), ("D", dim), ("HEADS", heads), ("QUERIES", queries)],
        grid=(parts.shape[0] * dim, 1, 1),
        threadgroup=(dim, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )
    return results[0]


@cache
def _joining(with_sinks: bool) -> CudaKernel:
    return CudaKernel(
        name="qgraph_join_splits" + "_sinks" * with_sinks,
        inputs=["parts", *["sinks"] * with_sinks],
        outputs=["y"],
        header=sources(),
        source="qgraph::Call<T> call{}; call.heads = HEADS; call.queries = QUERIES; "
        "call.splits = parts_shape[1]; call.parts = const_cast<float*>(parts); call.y = y; "
        f"call.sinks = {'sinks' if with_sinks else 'nullptr'}; "
        f"__shared__ float shared[{2 * BLOCKS}]; qgraph::join<D>(call, blockIdx.x, shared);",
    )
