"""Indices that a saved graph computes: none reads or writes beside what it indexes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.passes import FormRegions
from qgraph.runtime.guards import guarded
from tests.support.compiler import needs_compiler

W = mx.arange(32, dtype=mx.float32).reshape(8, 4)
X = mx.ones((2, 4))
FAR = 10**8
EVERYWHERE = [*qg.default_passes(qg.as_target("cpu")), FormRegions(everywhere=True)]


def far(x: Any, sign: int = 1) -> Any:
    """Indices that are nowhere near, which no pass can compute."""
    return x[:, 0].astype(mx.int32) * (sign * FAR)


LAST, FIRST = np.array(W)[[7, 7]], np.array(W)[[0, 0]]
HOSTILE: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "take": (lambda x: qg.take(W, far(x), axis=0), LAST),
    "take of all": (lambda x: qg.take(W, far(x)), [31, 31]),
    "below": (lambda x: qg.take(W, far(x, -1), axis=0), FIRST),
    "getitem": (lambda x: qg.tensor(W)[far(x)], LAST),
    "getitem of two": (lambda x: qg.tensor(W)[far(x), far(x, -1)], LAST[:, 0]),
    "narrow": (lambda x: qg.take(W, far(x).astype(mx.uint8) + 99, axis=0), LAST),
    "along": (lambda x: qg.take_along_axis(qg.tensor(W)[:2], far(x)[:, None], axis=1),
              np.array(W)[:2, 3:]),
    "slice": (lambda x: qg.slice(qg.tensor(W), far(x)[:1], (0,), (2, 4)), np.array(W)[6:]),
    "slice_update": (lambda x: qg.slice_update(qg.tensor(W), x, far(x)[:1], (0,)),
                     [*np.array(W)[:6], [1] * 4, [1] * 4]),
    "at": (lambda x: qg.tensor(W).at[far(x)].add(x), [*np.array(W)[:7], np.array(W)[7] + 2]),
    "in a loop": (
        lambda x: qg.fori_loop(0, 2, lambda i, h: h + qg.take(W, far(x) + i, axis=0), x * 0),
        2 * LAST,
    ),
    "experts": (lambda x: qg.gather_mm(
        x, mx.ones((2, 4, 4)), rhs_indices=far(x)[:1].astype(mx.uint32)), [[[4.0] * 4] * 2]),
}  # fmt: skip


@pytest.mark.parametrize("passes", [[], pytest.param(EVERYWHERE, marks=needs_compiler)], ids=len)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_loaded_program_stays_inside(name: str, passes: Any, tmp_path: Path) -> None:
    fn, wanted = HOSTILE[name]
    program = qg.compile(fn, X, target="cpu", passes=passes)
    loaded = qg.load(program.save(tmp_path))
    found = loaded(X)
    np.testing.assert_array_equal(np.array(found), wanted)
    mx.eval(mx.compile(loaded)(X))  # by MLX's own ops, regions dissolved


def test_an_argument_is_data_too(tmp_path: Path) -> None:
    program = qg.compile(lambda i: qg.take(W, i, axis=0), mx.array([1, 2]), target="cpu")
    loaded = qg.load(program.save(tmp_path))
    np.testing.assert_array_equal(loaded(mx.array([1, -2])), np.array(W)[[1, -2]])
    np.testing.assert_array_equal(loaded(mx.array([FAR, -FAR])), np.array(W)[[7, 0]])


INSIDE: dict[str, Callable[[Any], Any]] = {
    "constants": lambda x: qg.take(W, mx.array([0, -8, 7]), axis=0),
    "places of the largest": lambda x: qg.take(W, qg.argmax(x, axis=1), axis=0),
    "an order": lambda x: qg.take_along_axis(x, qg.argsort(x, axis=1), axis=1),
    "clipped": lambda x: qg.take(W, qg.clip(far(x), -8, 7), axis=0),
    "a dtype": lambda x: qg.take(mx.zeros(256), far(x).astype(mx.uint8)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_cannot_point_outside_is_left_alone(name: str) -> None:
    graph = qg.trace(INSIDE[name], X)
    assert guarded(graph) is graph


def test_what_is_held_is_held_once() -> None:
    graph = guarded(qg.trace(lambda x: qg.take(W, far(x), axis=0), X))
    assert [node.op for node in graph.nodes].count("clip") == 1
    assert guarded(graph) is graph
