"""Arrays that a function captures are constants: as they were when it was first compiled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from typer.testing import CliRunner

import qgraph as qg
from qgraph.cli import commands as cli
from qgraph.cli.sources import find
from qgraph.errors import InputError, TraceError

X = mx.array([1.0, 2.0])


def rows(count: int) -> mx.array:
    return mx.ones((count, 2)) * X


@pytest.mark.parametrize("quantized", [False, True])
def test_an_array_that_changes_is_the_same_for_all_shapes(quantized: bool) -> None:
    w = mx.random.normal((64, 64), key=mx.random.key(0))
    product = qg.quantized_matmul if quantized else qg.matmul
    program = qg.jit(lambda x: product(x, w), target="cpu")
    first = product(mx.ones((1, 64)), w)
    assert np.allclose(program(mx.ones((1, 64))), first, atol=1e-4)
    w += 1
    w[0] = 0
    for count in (1, 2, 3):
        assert np.allclose(program(mx.ones((count, 64))), mx.repeat(first, count, 0), atol=1e-4)


def test_a_compiled_program_keeps_its_arrays() -> None:
    w = mx.array([1.0, 2.0])
    program = qg.compile(lambda x: x * w, X, target="cpu")
    w *= 5
    assert program(X).tolist() == [1.0, 4.0]


GLOBAL = mx.array([1.0, 1.0])
STATE = SimpleNamespace(w=mx.array([1.0, 1.0]), _memo=mx.array([0.0, 0.0]))


def uses_global(x: Any) -> Any:
    return x + GLOBAL


def uses_state(x: Any) -> Any:
    return x + STATE.w + STATE._memo


class Held:
    def __init__(self) -> None:
        self.layers = [{"w": mx.array([1.0, 1.0])}]

    def __call__(self, x: Any) -> Any:
        return x + self.layers[0]["w"]


def test_another_array_under_the_same_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    held, module = Held(), nn.Linear(2, 2)
    program = qg.jit(uses_global, target="cpu")
    program(rows(1))
    monkeypatch.setitem(globals(), "GLOBAL", X * 2)
    program(rows(1))
    with pytest.raises(InputError, match="GLOBAL is another array than when"):
        program(rows(2))
    program = qg.jit(uses_state, target="cpu")
    program(rows(1))
    monkeypatch.setattr(STATE, "_memo", X * 0)  # what a module keeps for itself may change
    program(rows(2))
    monkeypatch.setattr(STATE, "w", X * 2)
    with pytest.raises(InputError, match=r"STATE\.w is another array"):
        program(rows(3))
    program = qg.jit(held.__call__, target="cpu")
    program(rows(1))
    held.layers[0]["w"] = X
    with pytest.raises(InputError, match=r"layers\.0\.w is another array"):
        program(rows(2))
    program = qg.jit(module, target="cpu")
    program(rows(1))
    module.update({"weight": mx.eye(2)})
    with pytest.raises(InputError, match="weight is another array"):
        program(rows(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def __call__(self, x: mx.array, scale: float = 1.0) -> mx.array:
        return self.down(nn.gelu(self.up(x))) * scale


def test_modules_are_imported() -> None:
    mx.random.seed(0)
    model, x = Block(), mx.random.normal((3, 64))
    for program in (
        qg.compile(model, qg.spec((3, 64)), target="cpu"),
        qg.compile(model, x, target="cpu"),
        qg.jit(model, target="cpu"),
    ):
        assert np.allclose(program(x), model(x), atol=1e-5)
        names = {n.args["name"] for n in program.plan.source.constants() if n.args["name"]}
        assert {"up.weight", "down.bias"} <= names
    program = qg.jit(model, target="cpu")
    assert np.allclose(program(x, scale=2.0), model(x) * 2, atol=1e-5)
    assert np.allclose(program(x[:1], scale=2.0), model(x[:1]) * 2, atol=1e-5)
    packed = qg.compile(model, x, target="cpu", quantize=qg.Quantize(8, 64))
    assert packed.weight_bytes < program.weight_bytes / 2
    assert np.allclose(packed(x), model(x), atol=2e-2)
    with pytest.raises(TraceError, match="missing a required argument: 'x'"):
        qg.compile(model)
    with pytest.raises(InputError, match="parameters= is not for a module"):
        qg.compile(model, x, parameters=[0])


def test_a_module_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_model.py").write_text(
        "import mlx.nn as nn\nmodel = nn.Sequential(nn.Linear(4, 8), nn.ReLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    found = find("some_model:model", ["f32[1,4]"])
    assert isinstance(found, qg.Graph)
    assert "layers.0.weight" in str(found)
    shown = CliRunner().invoke(cli.app, ["show", "some_model:model", "--spec", "f32[1,4]"])
    assert "layers.0.weight" in shown.output


def test_specs_of_an_import_may_name_and_mark_parameters() -> None:
    graph = qg.from_mlx(lambda w, x: x @ w, qg.spec((2, 2), name="weight", parameter=True), X)
    program = qg.compile(graph, target="cpu")
    assert str(graph).startswith("graph lambda(weight: f32[2,2]")
    assert program(program.prepare(mx.eye(2) * 3), X).tolist() == [3.0, 6.0]


def test_a_name_belongs_to_its_array_and_not_to_its_address() -> None:
    state = SimpleNamespace(w=mx.ones(4096))

    def fn(x: Any, n: int) -> Any:
        state.w = None
        made = [mx.full((4096,), i) for i in range(20)]  # one of them lies where w lay
        return [x + array for array in made]

    graph = qg.trace(fn, qg.spec((4096,)), 1)
    assert "w" not in {node.args["name"] for node in graph.constants()}
