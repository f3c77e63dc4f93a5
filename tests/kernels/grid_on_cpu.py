"""Runs a region's CUDA source on a CPU, through `grid_on_cpu.hpp`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph
from qgraph.ir.graph import Graph
from qgraph.runtime.regions.cuda.attention import THREADS
from qgraph.runtime.regions.cuda.expressions import TYPES
from qgraph.runtime.regions.cuda.peers import HALF, HEADER, PARTS
from qgraph.runtime.regions.cuda.region import ATTENTION, COUNTERS
from qgraph.runtime.regions.cuda.source import written
from qgraph.runtime.regions.cuda.translate import translate
from tests.support.compiler import loaded

HERE = Path(__file__).parent
ROOM = Path(qgraph.__file__).parent / "kernels"

OF_A_GPU = ("cuda/words", "cuda/grid", "matmul/tiled/instructions",
            "attention/attention_instructions")  # fmt: skip
"""What `grid_on_cpu.hpp` has in its own way."""

MAIN = """
#include "grid_on_cpu.hpp"
{parts}

void** all;

void kernel_of_region() {{
void** given = all + blockIdx.y * {count};  // of this rank
{arguments}
{text}
}}

extern "C" bool run(void** arrays, int blocks, int ranks, bool backwards, bool late) {{
  all = arrays;
  qgraph::phases::prepare(blocks * ranks, {threads}, {bytes}, late);
  return launch(kernel_of_region, {{blocks, ranks, 1}}, {threads}, blocks * ranks, backwards);
}}
"""


class OnCpu:
    """A region's body as its CUDA source, compiled for a CPU.

    Args:
        change: what a test does to all of the source first.
        ranks: GPUs of a mesh, whose blocks all run at the same time.

    Raises:
        Unknown: the back end cannot hold the body.
    """

    def __init__(
        self,
        body: Graph,
        folder: Path,
        blocks: int,
        change: Callable[[str], str] = str,
        ranks: int = 1,
    ) -> None:
        self.body, self.blocks, self.ranks = body, blocks, ranks
        self.stages = translate(body)
        self.source = written(self.stages, blocks, "sm_90", ranks)
        made = self.stages.arrays | {"done": ((self.source.room // 4,), mx.uint32)}
        self.made = {name: made[name] for name in self.source.outputs}
        types = {name: value.dtype for value, name in self.stages.inputs.items()}
        types |= {name: dtype for name, (_, dtype) in self.made.items()}
        lines = []
        for i, name in enumerate((*self.source.inputs, *self.source.outputs)):
            const = "const " * (name in self.source.inputs)
            other = mx.uint64 if name == "places" else mx.uint32
            type = f"{const}{TYPES[types.get(name, other)]}*"
            lines.append(f"[[maybe_unused]] auto {name} = static_cast<{type}>(given[{i}]);")
        parts = (name for name in (*PARTS, *ATTENTION) if name not in OF_A_GPU)
        text = MAIN.format(
            parts="".join((ROOM / f"{name}.cuh").read_text() for name in parts),
            arguments="\n".join(lines), text=self.source.text, count=len(lines),
            threads=THREADS, bytes=self.source.shared_memory,
        )  # fmt: skip
        (folder / "region.cpp").write_text(change(text))
        self.run: Any = loaded(folder / "region.cpp", f"-I{HERE}").run

        self.memory = [aligned(np.zeros(HEADER + 2 * HALF, np.uint8)) for _ in range(ranks)]
        """That all ranks reach, from call to call."""

    def __call__(
        self, inputs: Sequence[mx.array], *, backwards: bool = False, late: bool = False
    ) -> list[mx.array] | None:
        """The results; None if threads wait for ever.  `left` are then the barrier's counters."""
        results = self.on_ranks([inputs], backwards=backwards, late=late)
        return None if results is None else results[0]

    def on_ranks(
        self, inputs: Sequence[Sequence[mx.array]], *, backwards: bool = False, late: bool = False
    ) -> list[list[mx.array]] | None:
        """As a call, the inputs and the results of each rank."""
        counters, made, pointers, kept = [], [], [], []
        for rank, own in enumerate(inputs):
            arrays = dict(zip(self.body.inputs, own, strict=True))
            counters.append(np.zeros(COUNTERS, np.uint32))
            made.append([_nothing(*array) for array in self.made.values()])
            given = [_bits(arrays[value]) for value in self.stages.inputs]
            if self.stages.addends:
                places = [rank, HALF, *(m.ctypes.data for m in self.memory)]
                given.append(np.array(places, np.uint64))
            kept.append(given)
            around = counters[-1], counters[-1], *made[-1]
            pointers += [a.ctypes.data for a in (*given, *around)]
        table = (ctypes.c_void_p * len(pointers))(*pointers)
        if not self.run(table, self.blocks, self.ranks, backwards, late):
            return None
        self.left = [i for i in sum(counters).tolist() if i]
        return [self._results(arrays) for arrays in made]

    def _results(self, made: list[np.ndarray[Any, Any]]) -> list[mx.array]:
        found = {
            name: mx.array(array).view(dtype)
            for array, (name, (_, dtype)) in zip(made, self.made.items(), strict=True)
        }
        return [found[name] for name in self.stages.results]


def _nothing(shape: tuple[int, ...], dtype: mx.Dtype) -> np.ndarray[Any, Any]:
    """No numbers."""
    half = dtype.size == 2
    return np.full(shape, 0x7FC1 if half else 0x7FC00001, np.uint16 if half else np.uint32)


def _bits(array: mx.array) -> np.ndarray[Any, Any]:
    """Its bits, as unsigned integers."""
    sizes = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    bits = np.array(mx.contiguous(array).view(sizes[array.itemsize]))
    return aligned(np.ascontiguousarray(bits))


def aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same where 16 bytes can be read."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
