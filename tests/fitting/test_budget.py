"""The knapsack against all choices there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qgraph.fitting.budget import cheapest


@pytest.mark.parametrize("seed", range(6))
def test_the_knapsack_is_exact(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = (random.integers(1, 9, (5, 4)) * 8).tolist()
    costs = random.uniform(0, 1, (5, 4)).tolist()
    budget = int(random.integers(60, 200))
    fitting = [
        sum(c[i] for c, i in zip(costs, picks, strict=True))
        for picks in itertools.product(range(4), repeat=5)
        if sum(s[i] for s, i in zip(sizes, picks, strict=True)) <= budget
    ]
    found = cheapest(sizes, costs, budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert sum(s[i] for s, i in zip(sizes, found, strict=True)) <= budget
    assert sum(c[i] for c, i in zip(costs, found, strict=True)) == pytest.approx(min(fitting))
