"""Kernels by which GPUs talk, run by a CPU: the memory that ranks share, and all ranks at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qgraph.runtime.regions.cuda.peers import BYTES, HALF, INBOX_AT
from tests.kernels.grid_on_cpu import HERE, ROOM, aligned
from tests.support.compiler import loaded

PARTS = ("numbers", "phases", "peers", "exchange", "pushed")
HEAD = f"""
#include "grid_on_cpu.hpp"
#include "{ROOM}/matmul/tiled/formats.cuh"
"""


class RanksOnCpu:
    """Ranks that say something to each other, again and again.

    Args:
        main: C++ after the sources; its `run` takes pointers, rank after rank: to the places of the
            ranks' memory, then to the arrays of a call.
        change: made to all of the text.
    """

    def __init__(
        self, ranks: int, main: str, folder: Path, change: Callable[[str], str] = str
    ) -> None:
        sources = "".join((ROOM / "cuda" / f"{name}.cuh").read_text() for name in PARTS)
        (folder / "ranks.cpp").write_text(change(HEAD + sources + main))
        self.ranks = ranks
        self._run: Any = loaded(folder / "ranks.cpp", f"-I{HERE}").run
        self._memory = [aligned(np.zeros(BYTES, np.uint8)) for _ in range(ranks)]
        for memory in self._memory:
            memory[INBOX_AT + 128 :] = 0xFF

    def run(self, arrays: Sequence[Sequence[Any]], *others: Any) -> bool:
        """A launch on each rank, of its arrays.  False if they wait for ever."""
        addresses = [memory.ctypes.data for memory in self._memory]
        places = [np.array([rank, HALF, *addresses], np.uint64) for rank in range(self.ranks)]
        pointers = [
            array.ctypes.data
            for own, given in zip(places, arrays, strict=True)
            for array in (own, *given)
        ]
        return bool(self._run((ctypes.c_void_p * len(pointers))(*pointers), *others))
