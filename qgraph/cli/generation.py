"""`qgraph generate`, `chat` and `serve`: mlx-lm's commands, with accelerated models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..origin import NOWHERE
from .commands import app

_MLX_LMS = {
    "ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": True,
    "help_option_names": [],
}  # fmt: skip
Report = Annotated[
    bool, typer.Option("--report", help="Afterwards say what ran through programs, and what not.")
]
Html = Annotated[
    Path | None, typer.Option("--html", help="Write a page of the program that ran most often.")
]

Ranks = Annotated[
    int,
    typer.Option("--ranks", min=1, help="Spread the model over so many processes of this machine."),
]


def _run(context: typer.Context, report: bool, html: Path | None, ranks: int) -> None:
    """Run a command of mlx-lm's, here or in so many processes."""
    from ..lm import commands
    from ..lm.programs.background import settled

    name = context.info_name or ""
    if html is not None:
        commands.check_page(html)
    if ranks > 1:
        from ..lm.launch import launch

        options = [*(["--report"] if report else []), *(["--html", str(html)] if html else [])]
        raise typer.Exit(launch(ranks, [name, *options, *context.args]))
    if {"-h", "--help"} & set(context.args):
        theirs = commands.COMMANDS[name]
        typer.echo(
            f"qgraph's own: --report, --html PAGE, --ranks N.  The rest is mlx_lm.{theirs}'s:\n"
        )
    models: list[Any] = []
    try:
        models = commands.run(name, context.args)
    except OSError as error:  # such as a port that is taken
        words = f"{name}: {error.strerror or error}"
        raise InputError(words, hint="see --help", origin=NOWHERE) from error
    finally:
        if report:
            settled()
        for model in models if report else ():
            typer.echo(model.qgraph.report())
    if html is not None:
        for model in models[:1]:
            typer.echo(str(commands.save_page(model, html)))


@app.command(context_settings=_MLX_LMS)
def generate(
    context: typer.Context, report: Report = False, html: Html = None, ranks: Ranks = 1
) -> None:
    """Answer a prompt: `mlx_lm.generate` and its options, through programs.

    Launched by `mlx.launch`, or with `--ranks`, every rank holds its part of the model.
    """
    _run(context, report, html, ranks)


@app.command(context_settings=_MLX_LMS)
def chat(
    context: typer.Context, report: Report = False, html: Html = None, ranks: Ranks = 1
) -> None:
    """Talk to a model: `mlx_lm.chat` and its options, through programs."""
    _run(context, report, html, ranks)


@app.command(context_settings=_MLX_LMS)
def serve(
    context: typer.Context, report: Report = False, html: Html = None, ranks: Ranks = 1
) -> None:
    """Serve a model over HTTP: `mlx_lm.server` and its options, through programs."""
    _run(context, report, html, ranks)
