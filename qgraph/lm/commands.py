"""mlx-lm's own commands, with accelerated models."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..origin import NOWHERE
from .accelerate import accelerate
from .background import settled

COMMANDS = {"generate": "generate", "chat": "chat", "serve": "server"}
"""Names of qgraph's commands, and of mlx-lm's modules that hold them."""


def run(command: str, args: Sequence[str]) -> list[Any]:
    """Run one of mlx-lm's commands with its own arguments; gives the models that it loaded.

    Args:
        command: "generate", "chat" or "serve".
        args: what stands behind the command, in mlx-lm's words.
    """
    module: Any = importlib.import_module(f"mlx_lm.{COMMANDS[command]}")
    load, argv, models = module.load, sys.argv, []

    def accelerated(*given: Any, **settings: Any) -> Any:
        model, *rest = load(*given, **settings)
        models.append(accelerate(model))
        return models[-1], *rest

    module.load, sys.argv = accelerated, [f"qgraph {command}", *args]
    try:
        module.main()
    finally:
        module.load, sys.argv = load, argv
    return models


def save_page(model: Any, path: Path) -> Path:
    """Write the page of the program that ran most often.

    Raises:
        InputError: the model ran without programs.
    """
    settled()
    programs = [program for program in model.qgraph.programs if program.plan is not None]
    if not programs:
        raise InputError("no program was made", hint="see --report", origin=NOWHERE)
    most = max(programs, key=lambda program: program.calls)
    written: Path = most.plan.save(path)
    return written
