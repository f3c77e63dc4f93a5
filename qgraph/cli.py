"""The command line: `qgraph show`, `diff`, `dump`, `lint`, `demo` and `doctor`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .errors import QGraphError
from .ir import Graph
from .pipeline import optimize
from .plan import Plan
from .program import Program
from .trace import trace
from .types import DTYPES, Spec, spec

app = typer.Typer(
    name="qgraph",
    help="A graph compiler for quantized inference on MLX.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
console = Console()

Where = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:NAME",
        help="A graph, a program, or a function; a function needs a --spec for each argument.",
    ),
]
Specs = Annotated[
    list[str] | None,
    typer.Option("--spec", "-s", help='Type of an argument, such as "f16[1,4096]"; once for each.'),
]
TargetName = Annotated[
    str | None, typer.Option("--target", "-t", help='"cpu" or "gpu"; by default MLX\'s own choice.')
]


def parse_spec(text: str) -> Spec:
    """A type as prints show it: `f32[2,3]`, `i32[]`.

    >>> parse_spec("bf16[1,4096]").type
    bf16[1,4096]

    Raises:
        QGraphError: the text is no type.
    """
    name, bracket, rest = text.strip().partition("[")
    if name not in DTYPES or not bracket or not rest.endswith("]"):
        raise QGraphError(
            f"--spec {text!r} is no type", hint='write dtype and shape, such as "f32[1,64]"'
        )
    try:
        return spec([int(size) for size in rest[:-1].split(",") if size.strip()], DTYPES[name])
    except ValueError:
        raise QGraphError(f"--spec {text!r}: sizes are whole numbers") from None


def load(where: str, specs: list[str] | None) -> Graph:
    """The graph that `module:name` stands for; functions are traced on `specs`."""
    module_name, _, name = where.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name.removesuffix(".py").replace("/", "."))
    except ModuleNotFoundError as error:
        raise QGraphError(
            f"no module {error.name!r}", hint="write module:name; run where it can be imported"
        ) from None
    found: Any = getattr(module, name, None)
    if isinstance(found, Graph):
        return found
    if isinstance(found, Program):
        return found.plan.source
    if callable(found):
        return trace(found, *[parse_spec(text) for text in specs or []])
    raise QGraphError(
        f"{module_name} has no graph, program or function {name!r}",
        hint=f"it has {', '.join(n for n in vars(module) if not n.startswith('_')) or 'nothing'}",
    )


def _plan(where: str, specs: list[str] | None, target: str | None) -> Plan:
    return optimize(load(where, specs), target=target)


@app.command()
def show(
    where: Where,
    specs: Specs = None,
    target: TargetName = None,
    written: Annotated[bool, typer.Option("--written", help="As written, no passes.")] = False,
    report: Annotated[bool, typer.Option(help="Add the table of passes.")] = False,
) -> None:
    """Print a graph, optimized or as written.

    Example: `qgraph show examples.mlp:program`
    """
    if written:
        typer.echo(str(load(where, specs)))
        return
    plan = _plan(where, specs, target)
    typer.echo(str(plan.graph))
    if report:
        typer.echo(plan.report())


@app.command()
def dump(
    where: Where,
    folder: Annotated[Path, typer.Argument(help="Where to write.")] = Path("qgraph-dump"),
    specs: Specs = None,
    target: TargetName = None,
) -> None:
    """Write the graph after every pass, the report and the ledger to a folder."""
    typer.echo(f"written to {_plan(where, specs, target).dump(folder)}/")


@app.command()
def ledger(where: Where, specs: Specs = None, target: TargetName = None) -> None:
    """Print every decision about a quantize, a dequantize or a product, with its reason."""
    for entry in _plan(where, specs, target).ledger():
        typer.echo(str(entry))


@app.command()
def demo(
    model: Annotated[str, typer.Option(help='"smollm2", or "toy", which needs no download.')] = (
        "smollm2"
    ),
    prompt: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the plan is written.")] = Path("qgraph-demo"),
    tokens: Annotated[int, typer.Option(min=1, help="Length of the answer, at most.")] = 40,
) -> None:
    """A language model answers; a table shows what each pass is worth."""
    from . import demo as program

    if model not in ("smollm2", "toy"):
        raise typer.BadParameter(f"{model!r}: there are smollm2 and toy", param_hint="--model")
    question = program.PROMPT if prompt is None else prompt
    raise typer.Exit(program.main(model, question, folder, tokens, console))


@app.command()
def doctor() -> None:
    """Print versions, devices and caches, and what is wrong; exit status 1 if something is."""
    from .doctor import examine

    raise typer.Exit(examine(console))


def main(run: Callable[[], Any] = app) -> None:
    """The `qgraph` command: errors about a user's program are words, not tracebacks."""
    try:
        run()
    except QGraphError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
