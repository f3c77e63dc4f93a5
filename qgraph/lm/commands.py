"""mlx-lm's own commands, with accelerated models."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..compiler.pipeline import optimize
from ..errors import InputError
from ..origin import NOWHERE
from .accelerate import accelerate
from .launch import as_one, launched
from .load import check_folder, folder_of, load
from .programs.background import settled

COMMANDS = {"generate": "generate", "chat": "chat", "serve": "server"}
"""Names of qgraph's commands, and of mlx-lm's modules that hold them."""


def run(command: str, args: Sequence[str]) -> list[Any]:
    """Run one of mlx-lm's commands with its own arguments; gives the models that it loaded.

    Args:
        command: "generate", "chat" or "serve".
        args: what stands behind the command, in mlx-lm's words.
    """
    # mlx-lm's server would begin, and load in a thread.
    _check_places(args, folder_of if command == "serve" else check_folder)
    mesh = launched()
    module: Any = importlib.import_module(f"mlx_lm.{COMMANDS[command]}")
    mlx_load, argv, models = module.load, sys.argv, []

    def accelerated(*given: Any, **settings: Any) -> Any:
        if mesh is not None:
            settings["lazy"] = True  # each rank reads a weight when it packs its part
        model, *rest = load(*given, **settings)
        models.append(accelerate(model, mesh=mesh))
        return models[-1], *rest

    def spread(path: str, *groups: Any, **settings: Any) -> Any:
        """In place of mlx-lm's `sharded_load`: programs are spread, not the model."""
        settings.pop("pipeline_group", None), settings.pop("tensor_group", None)
        return accelerated(path, **settings)

    module.load, sys.argv = accelerated, [f"qgraph {command}", *args]
    mlx_spread = getattr(module, "sharded_load", None)
    module.sharded_load = spread
    try:
        with nullcontext() if mesh is None else as_one(mesh):
            module.main()
    finally:
        module.load, module.sharded_load, sys.argv = mlx_load, mlx_spread, argv
    return models if mesh is None or mesh.rank == 0 else []


def _check_places(args: Sequence[str], check_model: Callable[[str], object]) -> None:
    """Are the files and folders there that options name?"""
    words = [part for word in args for part in word.split("=", 1)]
    for option, value in pairwise(words):
        if option in ("--model", "--draft-model"):
            check_model(value)
        elif option in ("--adapter-path", "--prompt-cache-file") and not Path(value).exists():
            raise InputError(f"{option}: there is no {value}", hint="see --help")


def check_page(path: Path) -> None:
    """Could a page be written there?  To be asked before a model has run for it.

    Raises:
        InputError: not by this name, or there is no such folder.
    """
    if path.suffix != ".html":
        raise InputError(f"no page: {path.name}", hint="give a name with .html", origin=NOWHERE)
    if not path.parent.is_dir():
        raise InputError(
            f"there is no folder {path.parent}", hint="make it, or give another", origin=NOWHERE
        )


def save_page(model: Any, path: Path) -> Path:
    """Write the page of the program that ran most often.

    Raises:
        InputError: the model ran without programs.
    """
    settled()
    programs = model.qgraph.programs
    if not programs:
        raise InputError("no program was made", hint="see --report", origin=NOWHERE)
    most = max(programs, key=lambda program: program.calls)
    # What was read from the disk has no history.
    plan = most.plan or optimize(most.executable.graph, passes=[], target=most.executable.target)
    written: Path = plan.save(path)
    return written
