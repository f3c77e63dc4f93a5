"""The model that most tests fit."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.support.fitting import Model


@pytest.fixture
def model() -> Model:
    mx.random.seed(3)
    return Model()
