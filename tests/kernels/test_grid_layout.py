"""Where things lie in a block's shared memory: nothing overlaps, and the ring has its room."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph.kernels import Problem
from qgraph.runtime.regions.cuda.attention import WARPS
from qgraph.runtime.regions.cuda.expressions import Leaf
from qgraph.runtime.regions.cuda.layout import LANDING, Layout, laid_out
from qgraph.runtime.regions.cuda.stages import Phase, Stages
from qgraph.runtime.regions.unknown import Unknown

HOPPER = 226 << 10
"""Bytes that a block may have, but for those that CUDA and the compiler take."""


def phase(n: int, k: int, rows: int, parts: int = 1, bits: int = 4) -> Phase:
    problem = Problem(rows, n, k, mx.bfloat16, "affine", bits, 64, backend="cuda")
    return Phase(problem, Leaf("x", mx.bfloat16, 0, k), "w", "s", parts)


def stages(rows: int, hidden: int, inner: int, bits: int = 4) -> Stages:
    phases = [
        phase(hidden, hidden, rows, bits=bits), phase(2 * inner, hidden, rows, 2, bits),
        phase(hidden, inner, rows, bits=bits), phase(3 * hidden // 2, hidden, rows, bits=bits),
    ]  # fmt: skip
    return Stages(rows, {}, list(phases), [], {}, [])


def check(found: Layout, made: Stages, memory: int) -> None:
    begin = [16, found.work, found.kept, found.ring, found.size, memory]
    assert all(a <= b for a, b in pairwise(begin))
    assert all(place % 16 == 0 for place in (found.work, found.kept, found.ring, found.slot))
    assert found.slots > found.flight >= 2
    assert found.size == found.ring + WARPS * found.slots * (found.slot + LANDING)
    for i, one in made.products.items():
        own, k = found.products[i], one.problem.k
        assert own.rows % 16 == 0
        tiles = -(-k // 64)
        addends = min(WARPS, -(-tiles // own.piece))
        sums = one.parts * addends * made.rows * 16 * 4 * own.units
        assert found.work + sums == own.rows
        assert own.rows + made.rows * (tiles * 128 + 16) <= found.kept
        assert own.piece * (128 * one.problem.bits + 64) <= found.slot


@pytest.mark.parametrize(("rows", "slots", "piece"), [(1, 4, 4), (2, 4, 4), (3, 3, 4), (4, 3, 4)])
def test_rows_of_llama_8b(rows: int, slots: int, piece: int) -> None:
    made = stages(rows, 4096, 14336)
    found = laid_out(made, 132, HOPPER)
    check(found, made, HOPPER)
    assert (found.slots, found.products[2].piece) == (slots, piece)


def test_smaller_pieces_where_larger_ones_leave_no_room() -> None:
    made = stages(5, 4096, 14336)
    found = laid_out(made, 132, HOPPER)
    check(found, made, HOPPER)
    assert {own.piece for own in found.products.values()} == {2}


def test_rows_that_do_not_fit() -> None:
    with pytest.raises(Unknown, match="229504 bytes of x do not fit in shared memory"):
        laid_out(stages(8, 4096, 14336), 132, HOPPER)


@given(
    st.integers(1, 8), st.integers(1, 64), st.integers(1, 224), st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.integers(1, 132), st.integers(100, 226),
)  # fmt: skip
def test_nothing_overlaps(
    rows: int, hidden: int, inner: int, bits: int, blocks: int, memory: int
) -> None:
    made = stages(rows, 64 * hidden, 64 * inner, bits)
    try:
        found = laid_out(made, blocks, memory << 10)
    except Unknown:
        return
    check(found, made, memory << 10)
