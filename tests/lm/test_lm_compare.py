"""When a program gives what the model gives."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm")

from qgraph.lm.programs.compare import Difference, compared

LAYERS = 4


class AnyKind:
    """A cache that is an array."""

    def content(self, cache: mx.array, until: Any) -> list[mx.array]:
        return [cache]

    def until(self, cache: mx.array) -> None:
        return None

    def ends(self, cache: mx.array) -> bool:
        return False


def result(errors: list[float], dtype: mx.Dtype = mx.bfloat16, seed: int = 0) -> Any:
    """Caches and logits that are so far from the truth, relative to it; layer by layer."""
    truth, rng = np.random.default_rng(7), np.random.default_rng(seed)
    arrays = []
    for error in errors:
        right = truth.normal(size=(1, 64, 32))
        arrays.append(mx.array(right + error * rng.normal(size=right.shape)).astype(dtype))
    return arrays[-1], arrays[:-1]


def difference(
    mine: list[float],
    theirs: list[float],
    dtype: mx.Dtype = mx.bfloat16,
    nearly: tuple[float, ...] = (0, 0, 0, 0, 0),
) -> Any:
    """Of a program and a model; `nearly` is the model's with weights a little different."""

    def exactly() -> Any:
        assert dtype == mx.bfloat16  # float32 decides where it is not what is compared
        return result([0] * len(mine), mx.float32)

    kinds: Any = [AnyKind()] * LAYERS

    def moved() -> Any:
        assert dtype == mx.float32
        return result(list(nearly), dtype, 3)

    return compared(kinds, result(mine, dtype, 1), result(theirs, dtype, 2), exactly, moved)


def test_the_same_numbers() -> None:
    assert difference([0.0] * 5, [0.0] * 5, mx.float32) is None
    assert difference([0.01] * 5, [0.01] * 5) is None


def test_float32_that_parts() -> None:
    found = difference([0, 0, 0.01, 0.01, 0.01], [0] * 5, mx.float32)
    assert isinstance(found, Difference)
    assert (found.where, found.chance) == ("layer 2", True)  # one token of many may do that
    found = difference([0, 0, 0.1, 0.1, 0.1], [0] * 5, mx.float32)
    assert (found.where, found.chance) == ("layer 2", False)


def test_a_model_that_parts_from_itself_as_far() -> None:
    """By that layer; but not by more than one token of many may."""
    mine = [0.0, 0, 0.01, 0.012, 0.01]
    for nearly in ((0, 0, 0.008, 0, 0), (0, 0.02, 0.01, 0.01, 0.01)):
        assert difference(mine, [0] * 5, mx.float32, nearly=nearly) is None
    for nearly in ((1e-5, 1e-5, 1e-4, 1e-3, 1e-3), (0, 0, 0, 0.05, 0.05)):
        found = difference(mine, [0] * 5, mx.float32, nearly=nearly)
        assert isinstance(found, Difference)
        assert found.chance
    for mine in ([0.035] * 5, [0.035, 0.3, 0.5, 0.8, 0.8]):  # from before the model's chance on
        found = difference(mine, [0] * 5, mx.float32, nearly=(0, 0, 0, 0.5, 0.5))
        assert isinstance(found, Difference)
        assert found.where == "layer 0"
    nothing = float("inf")
    assert difference([0.0, 0, 0, 0.01, 0.01], [0] * 5, mx.float32, nearly=(0, 0, 0, 0, nothing))
    found = difference([0.0, 0.1, 0, 0, 0], [0] * 5, mx.float32, nearly=(0.1,) * 5)
    assert isinstance(found, Difference)
    assert not found.chance


def test_rounding_that_chooses_another_expert() -> None:
    """Whichever of them it was first, and at whichever token: both part from float32 like that."""
    first, later = [0.01, 0.10, 0.12, 0.13, 0.10], [0.01, 0.01, 0.02, 0.13, 0.11]
    assert difference(first, later) is None
    assert difference(later, first) is None


def test_half_precision_that_is_wrong() -> None:
    """In all layers, or in one alone."""
    for mine in ([0.3] * 5, [0.01, 0.01, 0.01, 0.10, 0.01]):
        found = difference(mine, [0.01] * 5)
        assert isinstance(found, Difference)
        assert found.chance
    assert found.where == "layer 3"
