"""Collectives over memory that GPUs share: the very source, run by a CPU, all ranks at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgraph.runtime.regions.cuda.exchange import TALKS
from qgraph.runtime.regions.cuda.peers import BLOCKS, HALF, HEADER, INBOX_AT, PIECE, TURNS
from tests.kernels.grid_on_cpu import ROOM, aligned
from tests.kernels.ranks_on_cpu import RanksOnCpu
from tests.support.faults import planted

FEW_BLOCKS, SMALL_PIECE = 2, 128

MAIN = """
void** all;
size_t count;

void kernel_of_talk() {{
  void** given = all + blockIdx.y * 3;  // of this rank
  qgraph::phases::talk<qgraph::phases::{talk}, float, {ranks}>(
      static_cast<const uint64_t*>(given[0]), static_cast<const float*>(given[1]),
      static_cast<float*>(given[2]), count);
}}

extern "C" bool run(void** arrays, size_t n, int blocks, bool backwards) {{
  all = arrays, count = n, slowness = 40;
  qgraph::phases::prepare(blocks * {ranks}, qgraph::phases::THREADS, 64, false);
  return launch(kernel_of_talk, {{blocks, {ranks}, 1}}, qgraph::phases::THREADS, blocks * {ranks},
                backwards);
}}
"""


class Ranks(RanksOnCpu):
    """GPUs that exchange something."""

    def __init__(
        self, op: str, ranks: int, folder: Path, change: Callable[[str], str] = str
    ) -> None:
        main = MAIN.format(talk=TALKS[op], ranks=ranks)

        def changed(text: str) -> str:
            return change(text.replace(f"PIECE = {PIECE}", f"PIECE = {SMALL_PIECE}"))

        super().__init__(ranks, main, folder, changed)

    def __call__(
        self, xs: list[Any], gives: int, count: int, backwards: bool = False
    ) -> list[Any] | None:
        given = [(aligned(x), aligned(np.full(gives, np.nan, np.float32))) for x in xs]
        fine = self.run(given, ctypes.c_size_t(count), FEW_BLOCKS, backwards)
        return [made for _, made in given] if fine else None


def wanted(op: str, xs: list[Any]) -> list[Any]:
    """What each rank gets, by NumPy."""
    ranks = len(xs)
    if op == "all_gather":
        return [np.concatenate(xs)] * ranks
    if op == "sum_scatter":
        return list(np.split(sum(x.astype(np.float64) for x in xs), ranks))
    word = {"all_sum": np.sum, "all_max": np.max, "all_min": np.min}[op]
    return [word(np.stack(xs).astype(np.float64), axis=0)] * ranks


def is_right(op: str, talk: Ranks) -> bool:
    """Pieces of several turns, sizes that are no multiples of 16 bytes, launch after launch."""
    random = np.random.default_rng(7)
    for number, count in enumerate((1, 3, 64, 100, 333, 640)):
        given = count * talk.ranks if op == "sum_scatter" else count
        gives = count * talk.ranks if op == "all_gather" else count
        xs = [random.normal(size=given).astype(np.float32) for _ in range(talk.ranks)]
        found = talk(xs, gives, count, bool(number % 2))
        if found is None:
            return False
        for one, right in zip(found, wanted(op, xs), strict=True):
            if not np.allclose(one, right, rtol=1e-6, atol=1e-6):
                return False
        if op != "sum_scatter" and not all(np.array_equal(found[0], one) for one in found):
            return False
    return True


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("op", TALKS)
def test_exchange(op: str, ranks: int, tmp_path: Path) -> None:
    assert is_right(op, Ranks(op, ranks, tmp_path))


FAULTS = {
    "one place for all turns": ("turn % TURNS * BLOCKS", "0 * BLOCKS"),
    "room for three turns": ("TURNS = 4", "TURNS = 3"),
    "nobody is told": ("rank, turn + 1);", "rank, turn);"),
    "nobody waits": ("i > Peers<RANKS>::POLLS", "true) break; if (false"),
    "a turn that is counted twice": ("table.turn++;", "table.turn += 1 + (table.rank == 0);"),
    "turns that are forgotten": ("[TURN] = turn;", "[TURN] = 0;"),
    "one place for all blocks": ("* BLOCKS + blockIdx.x;", "* BLOCKS;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    assert not is_right("all_sum", Ranks("all_sum", 2, tmp_path, planted(*FAULTS[fault])))


def test_memory_is_as_the_source_has_it() -> None:
    """`exchange.cuh` and `peers.py` lay it out alike."""
    text = (ROOM / "cuda" / "exchange.cuh").read_text()
    assert f"BLOCKS = {BLOCKS}, PIECE = {PIECE}, TURNS = {TURNS}" in text
    assert "HEADER = 4096" in (ROOM / "cuda" / "peers.cuh").read_text()
    assert INBOX_AT == HEADER + 2 * HALF + BLOCKS * (16 * 4 + TURNS * PIECE)
