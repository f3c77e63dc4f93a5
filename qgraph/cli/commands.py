"""The commands, one function each."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..compiler.pipeline import default_passes, optimize
from ..compiler.plan import Plan
from ..compiler.program import Program
from ..errors import QGraphError
from ..origin import is_ours
from ..target import as_target
from .sources import example_call, find, graph_of

HELP = """A graph compiler for quantized inference on MLX: see what it does to a model.

What looks at a model (`show` to `tune`) takes **WHERE**, one of

* `module:name` or `path/to/file.py:name`: a graph, a plan, a program, or a function. A function
  is traced; say what it takes with one `--spec` for each argument, such as `--spec "f16[1,4096]"`
  (dtype and shape as prints show them). A function without parameters may also return a graph
  or a program that it builds itself: the way for models that take trees of arrays.
* a graph saved by `graph.save("g.json")`.
* an artefact saved by `program.save(path)`.

Try `qgraph show qgraph.examples.first_program:graph`, then `qgraph diff` on the same.
"""
EPILOG = """Exit status: **0** done; **1** it found something (`lint`, `doctor`,
`diff --exit-code`); **2** it could not: wrong use, or an error in the model.
`qgraph --install-completion` completes commands and options in your shell."""

app = typer.Typer(
    name="qgraph", help=HELP, epilog=EPILOG, no_args_is_help=True, rich_markup_mode="markdown"
)
console = Console()
_NOT_THE_USERS = os.path.dirname(typer.__file__) + os.sep, f"{os.sep}mlx_lm{os.sep}"

Where = Annotated[
    str, typer.Argument(metavar="WHERE", help="module:name, a graph in .json, or an artefact.")
]
Specs = Annotated[
    list[str] | None,
    typer.Option("--spec", "-s", help='Type of an argument, such as "f16[1,4096]"; once for each.'),
]
TargetName = Annotated[
    str | None, typer.Option("--target", "-t", help='"cpu" or "gpu"; by default MLX\'s own choice.')
]
Colour = Annotated[
    bool | None,
    typer.Option("--colour/--no-colour", help="By default where the output is a terminal."),
]


def plan_of(where: str, specs: list[str] | None, target: str | None) -> Plan:
    """The plan behind `where`: its own, if it has one and no target is asked for."""
    found = find(where, specs or [])
    if target is None and isinstance(found, Plan | Program):
        return found if isinstance(found, Plan) else found.plan
    return optimize(graph_of(found), target=target)


@app.command()
def show(
    where: Where,
    specs: Specs = None,
    target: TargetName = None,
    written: Annotated[bool, typer.Option("--written", help="As written: no passes run.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Add the table of passes.")] = False,
    op: Annotated[str | None, typer.Option(help="Only this op; `*` stands for anything.")] = None,
    name: Annotated[str | None, typer.Option(help="Only values so named, such as `*q_proj*`.")] = (
        None
    ),
    line: Annotated[str | None, typer.Option(help="Only from here: `model.py` or `12`.")] = None,
    feeds: Annotated[str | None, typer.Option(help="Only what feeds this value: `%42`.")] = None,
    reads: Annotated[str | None, typer.Option(help="Only what comes of this value: `%42`.")] = None,
    depth: Annotated[int | None, typer.Option(min=0, help="So many steps from it.")] = None,
    costs: Annotated[bool, typer.Option("--costs", help="Bytes and FLOPs beside nodes.")] = False,
    fold: Annotated[bool, typer.Option("--fold", help="Repeated layers once.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Cut longer lists to so many.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page for browsers instead, with every pass.")
    ] = None,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Draw the estimated schedule of each stream instead.")
    ] = False,
    colour: Colour = None,
) -> None:
    """Print a graph: optimized, or as written, or the part of it that you ask for.

    `qgraph show qgraph.examples.first_program:graph`

    `qgraph show model.py:layer -s "f16[1,4096]" --op "*matmul*" --costs`

    `qgraph show plan.json --feeds %42 --depth 2`

    `qgraph show qgraph.examples.first_program:graph --html plan.html`
    """
    graph = graph_of(find(where, specs or [])) if written else None
    plan = None if graph is not None and not report else plan_of(where, specs, target)
    shown = graph if graph is not None else plan.graph if plan else None
    assert shown is not None
    if html is not None:
        page = plan.save(html) if plan and not written else shown.save(html)
        return typer.echo(f"written to {page}; open it in a browser")
    if timeline:
        from ..inspection.timeline import timelines

        on = as_target(target) if plan is None else plan.target
        return typer.echo(timelines(shown, on, width=console.width))
    in_colour = console.is_terminal if colour is None else colour
    typer.echo(
        shown.format(
            op=op, name=name, line=line, feeds=feeds, reads=reads, depth=depth, costs=costs,
            fold=fold, limit=limit, colour=in_colour,
        ),
        color=in_colour,
    )  # fmt: skip
    if report and plan is not None:
        typer.echo(plan.report())


@app.command()
def diff(
    where: Where,
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="A second graph: the one after.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--pass", "-p", help="What this pass did; by default all.")
    ] = None,
    specs: Specs = None,
    target: TargetName = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Status 1 if they differ.")] = (
        False
    ),
    colour: Colour = None,
) -> None:
    """Say what the passes did, node by node, with the reasons; or how two graphs differ.

    `qgraph diff qgraph.examples.first_program:graph --pass hoist-quantize`

    `qgraph diff before.json after.json --exit-code`
    """
    from ..inspection.diff import diff_graphs

    if other is not None:
        before, after = graph_of(find(where, specs or [])), graph_of(find(other, specs or []))
        found = diff_graphs(before, after)
    else:
        found = plan_of(where, specs, target).diff(run)
    in_colour = console.is_terminal if colour is None else colour
    typer.echo(found.format(colour=in_colour), color=in_colour)
    raise typer.Exit(int(exit_code and not found.is_empty))


@app.command()
def dump(
    where: Where,
    folder: Annotated[Path, typer.Argument(help="Where to write.")] = Path("qgraph-dump"),
    specs: Specs = None,
    target: TargetName = None,
) -> None:
    """Write the graph after every pass, the report and the ledger to a folder.

    `qgraph dump qgraph.examples.first_program:graph plan/`
    """
    typer.echo(f"written to {plan_of(where, specs, target).dump(folder)}/")


@app.command()
def ledger(where: Where, specs: Specs = None, target: TargetName = None) -> None:
    """Print every decision about a quantize, a dequantize or a product, with its reason."""
    for entry in plan_of(where, specs, target).ledger():
        typer.echo(str(entry))


@app.command()
def lint(where: Where, specs: Specs = None) -> None:
    """Name what is costly in the model as written; status 1 if there is something.

    Each with an estimate, and with what `optimize` makes of it.

    `qgraph lint model.py:step --spec "f16[1,4096]"`
    """
    from ..inspection.lint import explained
    from ..inspection.lint import lint as costly

    graph = graph_of(find(where, specs or []))
    findings = costly(graph)
    if findings:
        findings = explained(findings, optimize(graph, check=False).ledger())
    for finding in findings:
        typer.echo(str(finding))
    if not findings:
        typer.echo("nothing costly found")
    raise typer.Exit(int(bool(findings)))


@app.command()
def profile(
    where: Where,
    specs: Specs = None,
    target: TargetName = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; medians are shown.")] = 5,
    top: Annotated[int, typer.Option(min=1, help="Show so many of the costliest nodes.")] = 20,
    html: Annotated[
        Path | None, typer.Option(help="Write a page for browsers too, coloured by time.")
    ] = None,
) -> None:
    """Time each node on made-up inputs, beside an estimate and this machine's copy bandwidth.

    `qgraph profile qgraph.examples.first_program:graph`
    """
    program = _program(where, specs, target)
    measured = program.profile(*example_call(program.plan.graph), repeats=repeats)
    typer.echo(measured.format(top=top))
    if html is not None:
        typer.echo(f"written to {program.plan.save(html, measured)}; open it in a browser")


@app.command()
def tune(where: Where, specs: Specs = None, target: TargetName = None) -> None:
    """Time every way of carrying out the products of a model here, and keep the results.

    Later compiles of the same shapes on this machine use them.

    `qgraph tune model.py:step --spec "f16[1,4096]" --target gpu`
    """
    from rich.progress import track

    from ..analysis.problems import product_problem
    from ..kernels.choice.tuner import choose

    where_to = as_target(target)
    # Up to where kernels are chosen: what comes after splits products over cores.
    passes = takewhile(lambda p: p.name != "choose-kernel", default_passes(where_to))
    graph = graph_of(find(where, specs or []))
    graph = optimize(graph, target=where_to, passes=list(passes)).graph
    found = [product_problem(node, where_to) for _, node in graph.walk()]
    problems = list(dict.fromkeys(problem for problem in found if problem is not None))
    if not problems:
        typer.echo("there is no quantized product to tune")
    for problem in track(problems, "measuring", console=Console(stderr=True)):
        typer.echo(f"{problem}: {choose(problem, tune=True)}")


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
    """Print versions, devices and caches, and what is wrong; status 1 if something is."""
    from .doctor import examine

    raise typer.Exit(examine(console))


def _program(where: str, specs: list[str] | None, target: str | None) -> Program:
    found = find(where, specs or [])
    if isinstance(found, Program) and target is None:
        return found
    return Program(None, plan_of(where, specs, target))


def main(run: Callable[[], Any] = app) -> None:
    """The `qgraph` command: errors about a user's program are words, not tracebacks."""
    try:
        run()
    except (QGraphError, ValueError, ImportError) as error:
        words = str(error)
        if not isinstance(error, QGraphError):
            *_, last = traceback.extract_tb(error.__traceback__)
            if not is_ours(last.filename):
                words = f"{type(error).__name__}: {words}\n  at {last.filename}:{last.lineno}"
        elif any(f in error.origin.file for f in _NOT_THE_USERS):
            words = "\n  ".join(filter(None, (error.what, error.hint)))  # no line of the user's
        Console(stderr=True).print("[bold red]error:[/]", end=" ")
        typer.echo(words, err=True)
        sys.exit(2)
