"""Runs a region's CUDA source on a CPU, through `grid_on_cpu.hpp`."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph
from qgraph.ir.graph import Graph
from qgraph.runtime.regions.cuda.expressions import TYPES
from qgraph.runtime.regions.cuda.source import THREADS, written
from qgraph.runtime.regions.cuda.stages import translate

HERE = Path(__file__).parent
ROOM = Path(qgraph.__file__).parent / "kernels"

MAIN = """
#include "grid_on_cpu.hpp"
#include "{room}/matmul/tiled_formats.cuh"
{phases}

void** given;

void kernel_of_region() {{
{arguments}
{text}
}}

extern "C" bool run(void** arrays, int blocks, bool backwards, bool late) {{
  given = arrays;
  qgraph::phases::prepare(blocks, {threads}, {bytes}, late);
  return launch(kernel_of_region, {{blocks, 1, 1}}, {threads}, blocks, backwards);
}}
"""


class OnCpu:
    """A region's body as its CUDA source, compiled for a CPU.

    Args:
        change: what a test does to all of the source first.

    Raises:
        Unknown: the back end cannot hold the body.
    """

    def __init__(
        self, body: Graph, folder: Path, blocks: int, change: Callable[[str], str] = str
    ) -> None:
        self.body, self.blocks = body, blocks
        self.stages = translate(body)
        self.source = written(self.stages, blocks, "sm_90")
        types = {name: value.dtype for value, name in self.stages.inputs.items()}
        types |= {name: dtype for name, (_, dtype) in self.stages.arrays.items()}
        lines = []
        for i, name in enumerate((*self.source.inputs, *self.source.outputs)):
            const = "const " * (name in self.source.inputs)
            type = f"{const}{TYPES[types.get(name, mx.uint32)]}*"
            lines.append(f"[[maybe_unused]] auto {name} = static_cast<{type}>(given[{i}]);")
        text = MAIN.format(
            room=ROOM, phases=(ROOM / "cuda" / "phases.cuh").read_text(),
            arguments="\n".join(lines), text=self.source.text,
            threads=THREADS, bytes=self.source.shared_memory,
        )  # fmt: skip
        (folder / "region.cpp").write_text(change(text))
        subprocess.run(
            ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}",
             "-o", folder / "region.so", folder / "region.cpp"],
            check=True,
        )  # fmt: skip
        self.run: Any = ctypes.CDLL(str(folder / "region.so")).run

    def __call__(
        self, inputs: Sequence[mx.array], *, backwards: bool = False, late: bool = False
    ) -> list[mx.array] | None:
        """The results; None if threads wait for ever.  `left` are then the barrier's counters."""
        arrays = dict(zip(self.body.inputs, inputs, strict=True))
        counters = np.zeros(64, np.uint32)
        given = [_bits(arrays[value]) for value in self.stages.inputs]
        made = [
            np.full(shape, 0x7FC1 if dtype.size == 2 else 0x7FC00001,
                    np.uint16 if dtype.size == 2 else np.uint32)
            for shape, dtype in self.stages.arrays.values()
        ]  # fmt: skip
        pointers = [a.ctypes.data for a in (*given, counters, counters, *made, counters)]
        fine = self.run((ctypes.c_void_p * len(pointers))(*pointers), self.blocks, backwards, late)
        if not fine:
            return None
        self.left = counters[:2].tolist()
        found = {
            name: mx.array(array).view(dtype)
            for array, (name, (_, dtype)) in zip(made, self.stages.arrays.items(), strict=True)
        }
        return [found[name] for name in self.stages.results]


def _bits(array: mx.array) -> np.ndarray[Any, Any]:
    """In memory that begins where 16 bytes can be read."""
    sizes = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    bits = np.array(mx.contiguous(array).view(sizes[array.itemsize]))
    room = np.empty(bits.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + bits.nbytes] = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    return room[start : start + bits.nbytes].view(bits.dtype).reshape(bits.shape)
