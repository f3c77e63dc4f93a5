"""Factors of channels in a fit; that they may move is proven in `tests/passes/test_fold_scales`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.support.fitting import Model, data, shrunk


def test_factors_of_another_graph_do_not_count(model: Model) -> None:
    """Where a fold cannot be proven, weights are rounded as they are: the function is the same."""
    config = qg.Quantize.fit(model, data(), bits=6, methods=("awq", "gptq"), formats=[{"bits": 5}])
    assert config.folded is not None

    class Other(Model):
        def __call__(self, ids: mx.array) -> mx.array:
            return super().__call__(ids) + self.norm(self.embed(ids)).sum()

    other = Other()
    other.update(model.parameters())
    program = qg.compile(other, data(1)[0], quantize=config)
    said = [str(e) for e in program.plan.ledger()]
    assert any("its factors stay where they are: sum does not commute" in line for line in said)
    assert any("up.weight" in line and "for other numbers" in line for line in said)


def test_what_is_fitted_before_sees_inputs_as_factors_leave_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A weight that two products read is fitted on what the float graph gave it."""
    from qgraph.fitting.job import Job

    norm = mx.exp(1.5 * mx.random.normal((64,), key=mx.random.key(9)))
    up, once = (mx.random.normal((64, 64), key=mx.random.key(i)) / 8 for i in (1, 4))

    def fn(x: Any) -> Any:
        y = qg.fast.rms_norm(x, norm, 1e-5)
        return (y @ once.T + y @ up.T).sum(axis=0) + qg.tanh(y[:4] @ up.T).sum(axis=0)

    x = mx.random.normal((256, 64), key=mx.random.key(2))
    seen: dict[str, np.ndarray] = {}
    plain = Job._fit

    def fit(self: Job, weight: Any, hessian: Any) -> None:
        seen[weight.name] = hessian((weight.name, ()))
        plain(self, weight, hessian)

    monkeypatch.setattr(Job, "_fit", fit)
    config = qg.Quantize.fit(
        qg.trace(fn, x), [x], bits=4, methods=("awq", "gptq"), formats=[{"bits": 3}]
    )
    assert config.folded is not None
    rows = np.array(x, np.float64)
    y = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5)
    y = y * np.array(norm) / np.array(config.folded["norm"])
    y = np.concatenate([y, y[:4]])
    wanted = shrunk(y.T @ y / len(y), len(y))
    np.testing.assert_allclose(seen["up"], wanted, rtol=1e-3, atol=1e-3)
