"""Sums that two GPUs push to each other: the very source, run by a CPU, both ranks at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgraph.mesh import INBOX
from qgraph.runtime.regions.cuda.peers import BYTES, INBOX_AT
from tests.kernels.grid_on_cpu import ROOM, aligned
from tests.kernels.ranks_on_cpu import RanksOnCpu
from tests.support.faults import planted

BLOCKS, WARPS, LAUNCHES, EPS = 2, 2, 3, 1e-5
WIDTH = 32 * WARPS * 4
NAN = np.array([0xFFFFFFFF], np.uint32).view(np.float32)[0]
"""That which stands where nothing has come yet."""

MAIN = """
void** all;
unsigned count, width;

template <int CHUNKS, bool FUSED>
void kernel_of_push() {{
  using namespace qgraph::phases;
  void** given = all + blockIdx.y * 6;  // of this rank
  float** arrays = reinterpret_cast<float**>(given + 1);
  const auto places = static_cast<const uint64_t*>(given[0]);
  for (int i = 0; i < {launches}; i++) {{
    const unsigned* ended = Inbox(places).header + Inbox::LAUNCHES;
    const unsigned before = *ended;
    const size_t at = size_t(i) * count;
    push_sum<float, CHUNKS, FUSED, FUSED>(places, arrays[0] + at, arrays[1], arrays[2],
                                          arrays[3] + at, arrays[4] + at, count, width, {eps}f);
    while (load_acquired(ended) == before) {{}}  // the next begins when all blocks have ended
  }}
}}

extern "C" bool run(void** arrays, unsigned size, unsigned n, bool fused, bool backwards) {{
  all = arrays, count = size, width = n, slowness = 16;
  qgraph::phases::prepare({blocks} * 2, qgraph::phases::THREADS, 64, false);
  return launch(fused ? kernel_of_push<2, true> : kernel_of_push<1, false>, {{{blocks}, 2, 1}},
                qgraph::phases::THREADS, {blocks} * 2, backwards);
}}
"""


class Ranks(RanksOnCpu):
    """Two GPUs that push something to each other."""

    def __init__(self, folder: Path, change: Callable[[str], str] = str) -> None:
        main = MAIN.format(eps=EPS, blocks=BLOCKS, launches=LAUNCHES)

        def changed(text: str) -> str:
            return change(text.replace("WARPS = 16", f"WARPS = {WARPS}"))

        super().__init__(2, main, folder, changed)

    def __call__(
        self, xs: list[Any], width: int, h: Any, weight: Any, fused: bool, backwards: bool
    ) -> list[Any] | None:
        made = [[aligned(np.full(x.size, 7, np.float32)) for _ in range(2)] for x in xs]
        given = [(x, h, weight, *own) for x, own in zip(xs, made, strict=True)]
        fine = self.run(given, xs[0].size // LAUNCHES, width, fused, backwards)
        return [one for own in made for one in own] if fine else None


def is_right(push: Ranks) -> bool:
    """Launch after launch: sums alone, and with a residual and a norm; rows and a part of one."""
    random = np.random.default_rng(3)
    cases = ((1, 4, False), (5, WIDTH + 4, False), (9, WIDTH + 4, True), (2, 2 * WIDTH, True))
    for number, (rows, width, fused) in enumerate(cases):
        xs = [aligned(random.normal(size=LAUNCHES * rows * width).astype(np.float32))
              for _ in range(2)]  # fmt: skip
        xs[0][xs[0].size // 2] = NAN
        h = aligned(random.normal(size=rows * width).astype(np.float32))
        weight = aligned(random.normal(size=width).astype(np.float32))
        found = push(xs, width if fused else WIDTH, h, weight, fused, bool(number % 2))
        if found is None:
            return False
        total = (xs[0].astype(np.float64) + xs[1]).reshape(LAUNCHES, rows, width)
        if fused:
            total += h.reshape(rows, width)
            norm = total / np.sqrt((total**2).mean(-1, keepdims=True) + EPS) * weight
        for summed, normed in (found[:2], found[2:]):
            right = np.allclose(summed, total.ravel(), rtol=1e-6, atol=1e-6, equal_nan=True)
            if fused:
                right &= np.allclose(normed, norm.ravel(), rtol=1e-4, atol=1e-5, equal_nan=True)
            if not right:
                return False
        if not np.array_equal(found[0], found[2], equal_nan=True):
            return False
    return True


def test_pushed(tmp_path: Path) -> None:
    assert is_right(Ranks(tmp_path))


FAULTS = {
    "one half for all launches": ("% 2 * BYTES", "* 0 * BYTES"),
    "what was read stays": ("= {NOTHING, NOTHING, NOTHING, NOTHING};", ";"),
    "nobody waits": ("if (v.x != NOTHING &&", "if (true || v.x != NOTHING &&"),
    "a number that is nothing": ("v == NOTHING ? v - 1 : v", "v"),
    "launches that are not counted": ("header[LAUNCHES]++;", ""),
    "a block that does not push ahead": ("push(row + gridDim.x, next);", ";"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    assert not is_right(Ranks(tmp_path, planted(*FAULTS[fault])))


def test_memory_is_as_the_source_has_it() -> None:
    """`pushed.cuh` and `peers.py` lay it out alike."""
    text = (ROOM / "cuda" / "pushed.cuh").read_text()
    assert f"BYTES = {INBOX >> 20} << 20, HEADER = {BYTES - INBOX_AT - 2 * INBOX}" in text
