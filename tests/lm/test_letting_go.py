"""Weights of a model that a rank lets go once its part is packed, and reads again if need be."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from qgraph.errors import MeshError, QGraphError
from qgraph.ir.graph import Value
from qgraph.lm.letting_go import LettingGo
from qgraph.lm.source import Source
from qgraph.tracing.constants import Constants, constant_for
from qgraph.tracing.trace import sharing
from tests.support.rank import tiny


def constant(array: mx.array) -> tuple[Value, Constants]:
    constants = Constants()
    with sharing(constants):
        return constant_for(array, "w"), constants


def scales(model: Any) -> mx.array:
    found: mx.array = model.model.layers[0].mlp.up_proj.scales
    return found


def test_what_cannot_be_read_again_stays_unless_parts_of_it_are_kept() -> None:
    model = tiny()
    value, constants = constant(scales(model))
    letting_go = LettingGo(None)
    letting_go.let_go(value, False, constants)
    assert not letting_go
    assert not value.node.args["data"].is_released
    assert not mx.any(mx.isnan(scales(model))).item()
    letting_go.let_go(value, True, constants)
    assert letting_go
    assert mx.all(mx.isnan(scales(model))).item()
    with pytest.raises(QGraphError, match="was released"):
        _ = value.node.args["data"].array


def test_what_came_from_files_is_read_again() -> None:
    model = tiny()
    Source.note(model, tiny)
    value, constants = constant(scales(model))
    LettingGo(Source.of(model)).let_go(value, False, constants)
    assert mx.all(mx.isnan(scales(model))).item()
    for _ in range(2):
        assert mx.array_equal(value.node.args["data"].array, scales(tiny())).item()


def test_what_was_put_in_later_is_not_read_from_files() -> None:
    model = tiny()
    Source.note(model, tiny)
    model.model.layers[0].mlp.up_proj.scales = scales(model) * 2
    value, constants = constant(scales(model))
    LettingGo(Source.of(model)).let_go(value, False, constants)
    assert not value.node.args["data"].is_released


def test_other_weights_after_some_were_let_go() -> None:
    model = tiny()
    value, constants = constant(scales(model))
    letting_go = LettingGo(None)
    letting_go.check(model)
    letting_go.let_go(value, True, constants)
    with pytest.raises(MeshError, match=r"model.layers.0.mlp.up_proj.scales was let go"):
        letting_go.check(model)
    model.model.layers[0].mlp.up_proj.scales = scales(tiny())
    letting_go.check(model)
