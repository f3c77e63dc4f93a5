"""mlx-lm's commands on several ranks: how they are launched, and what they load."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from typer.testing import CliRunner

import qgraph as qg
from qgraph.cli import app
from qgraph.lm import commands, launch


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_ranks_launches_the_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(launch, "launch", lambda *args: given.append(args) or 3)
    result = CliRunner().invoke(app, [command, "--ranks", "2", "--report", "--model", "m"])
    assert result.exit_code == 3
    assert given == [(2, [command, "--report", "--model", "m"])]


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_a_rank_loads_lazily_where_mlx_lm_would_spread_the_model(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    mesh = qg.Mesh(1, rank=0)
    module: Any = ModuleType("mlx_lm." + commands.COMMANDS[command])
    groups = {"pipeline_group": None, "tensor_group": mx.distributed.init()}
    module.load = module.sharded_load = None
    module.main = lambda: module.sharded_load("folder", return_config=True, **groups)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(commands, "launched", lambda: mesh)
    monkeypatch.setattr(
        commands, "load", lambda *a, **k: loaded.append((a, k)) or (SimpleNamespace(), None)
    )
    monkeypatch.setattr(commands, "accelerate", lambda model, mesh: (model, mesh))
    assert [at for _, at in commands.run(command, [])] == [mesh]
    assert loaded == [(("folder",), {"return_config": True, "lazy": True})]
    assert module.sharded_load is None


def test_ranks_in_words(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["chat", "--ranks", "0"])
    assert result.exit_code == 2
    assert "--ranks" in result.output
