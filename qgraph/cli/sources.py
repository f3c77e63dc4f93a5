"""What a word on the command line stands for: `module:name`, a saved graph or an artefact."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from ..compiler.plan import Plan
from ..compiler.program import Program
from ..errors import InputError, QGraphError
from ..importer import from_mlx
from ..ir.graph import Graph
from ..origin import NOWHERE
from ..tracing.trace import trace
from ..types import DTYPES, Spec, spec


def _wrong(what: str, hint: str) -> InputError:
    """An error about a word on the command line, which has no line in a file."""
    return InputError(what, hint=hint, origin=NOWHERE)


def parse_spec(text: str) -> Spec:
    """A type as prints show it: `f32[2,3]`, `i32[]`; after a name and a colon, if it has one.

    >>> parse_spec("bf16[1,4096]").type
    bf16[1,4096]
    >>> parse_spec("tokens: i32[16]").name
    'tokens'

    Raises:
        InputError: the text is no type.
    """
    name, _, type_text = text.rpartition(":")
    short, bracket, rest = type_text.strip().partition("[")
    if short not in DTYPES or not bracket or not rest.endswith("]"):
        raise _wrong(
            f"--spec {text!r} is no type",
            hint=f'write dtype and shape, such as "f32[1,64]"; dtypes are {", ".join(DTYPES)}',
        )
    try:
        sizes = [int(size) for size in rest[:-1].split(",") if size.strip()]
        return spec(sizes, DTYPES[short], name.strip() or None)
    except ValueError:
        raise _wrong(
            f"--spec {text!r}: sizes are whole numbers of 0 or more", hint='such as "f32[1,64]"'
        ) from None


def find(where: str, specs: Sequence[str] = ()) -> Graph | Plan | Program:
    """The thing that `where` names.

    A file is loaded: a graph from `.json`, a program from anything else.  `module:name` is
    imported, from the current folder too: a graph, a plan or a program is taken as it is; a
    function is traced on `specs`; one without parameters may also return a graph, a plan or a
    program that it made itself.

    Raises:
        InputError: there is nothing of that name, or it is nothing that can be shown.
    """
    path = Path(where)
    if path.exists() and path.suffix != ".py":
        return load_file(path)
    module_name, colon, name = where.partition(":")
    if not colon and path.exists():
        raise _wrong(
            f"{where} is a file of Python, and it is not said what in it",
            hint=f"write {where}:NAME; it has {_choices(_module(where))}",
        )
    if not colon:
        raise _wrong(
            f"there is no file {where!r}, and it is no module:name",
            hint="write module:name, such as qgraph.examples.first_program:graph, or a saved file",
        )
    found = _attribute(_module(module_name), name)
    if isinstance(found, Graph | Plan | Program):
        return found
    if not callable(found):
        raise _wrong(
            f"{where} is of type {type(found).__name__}",
            hint="name a function, a graph or a program",
        )
    if not specs and _takes_nothing(found):
        made = found()
        if isinstance(made, Graph | Plan | Program):
            return made
    given = [parse_spec(text) for text in specs]
    _refuse_misfit(where, found, given)
    return from_mlx(found, *given) if isinstance(found, Module) else trace(found, *given)


def load_file(path: Path) -> Graph | Program:
    """A graph saved as JSON, or an artefact."""
    from ..compiler.api import load

    if path.suffix != ".json":
        return load(path)
    try:
        return Graph.from_json(path.read_text())
    except QGraphError as error:
        raise _wrong(
            f"{path}: {error.what}",
            hint='graph.save("graph.json") writes one; the JSON of a dump lacks the arrays',
        ) from None


def _refuse_misfit(where: str, fn: Any, given: Sequence[Spec]) -> None:
    try:
        inspect.signature(fn).bind(*given)
    except TypeError as error:
        raise _wrong(
            f"{where}: {error}",
            hint='give one --spec for each argument, such as --spec "f16[1,4096]"',
        ) from None
    except ValueError:
        raise _wrong(
            f"{where} is a {type(fn).__name__}, which does not say what it takes",
            hint="name a Python function that calls it",
        ) from None


def _takes_nothing(fn: Any) -> bool:
    try:
        inspect.signature(fn).bind()
    except (TypeError, ValueError):
        return False
    return True


def _module(name: str) -> Any:
    here, file = Path.cwd(), Path(name).resolve()
    if name.endswith(".py") and not file.is_relative_to(here):
        here = file.parent
    if str(here) not in sys.path:
        sys.path.insert(0, str(here))
    inside = file.relative_to(here).with_suffix("") if name.endswith(".py") else None
    dotted = name.replace("/", ".") if inside is None else ".".join(inside.parts)
    try:
        with redirect_stdout(sys.stderr):  # what the module prints is no part of the answer
            return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        raise _wrong(
            f"{name!r} cannot be imported: there is no module {error.name!r}",
            hint="run this where `import` finds it, or name the file: path/to/file.py:name",
        ) from None
    except SyntaxError as error:
        raise _wrong(
            f"{name!r} cannot be imported: {error.msg} in {error.filename}, line {error.lineno}",
            hint="mend that line first",
        ) from None


def _attribute(module: Any, name: str) -> Any:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise _wrong(f"{module.__name__} has no {name!r}", hint=f"it has {_choices(module)}")
        found = getattr(found, part)
    return found


def _choices(module: Any) -> str:
    """The names of a module that could be meant."""
    names = [n for n, v in vars(module).items() if _is_choice(module, n, v)]
    return ", ".join(names) or "nothing that can be shown"


def _is_choice(module: Any, name: str, thing: Any) -> bool:
    if name.startswith("_") or isinstance(thing, type):
        return False
    own = getattr(thing, "__module__", None) == module.__name__
    return isinstance(thing, Graph | Plan | Program) or (callable(thing) and own)


def graph_of(found: Graph | Plan | Program) -> Graph:
    """The graph as it was written."""
    if isinstance(found, Graph):
        return found
    return found.source if isinstance(found, Plan) else found.plan.source


def example_inputs(graph: Graph, seed: int = 0) -> list[mx.array]:
    """Arrays of the graph's input types: floats are normal, integers and bools zero."""
    keys = mx.random.split(mx.random.key(seed), max(1, len(graph.inputs)))
    return [
        mx.random.normal(v.shape, key=key).astype(v.dtype)
        if mx.issubdtype(v.dtype, mx.floating)
        else mx.zeros(v.shape, v.dtype)
        for v, key in zip(graph.inputs, keys, strict=False)
    ]


def example_call(graph: Graph) -> tuple[Any, ...]:
    """`example_inputs` in the form of the positional arguments that the graph was traced with.

    Raises:
        InputError: it was traced with keyword arguments.
    """
    arrays = example_inputs(graph)
    if graph.in_tree is None:
        return tuple(arrays)
    args, kwargs = graph.in_tree.build(arrays)
    if kwargs:
        raise _wrong("the graph takes keyword arguments", hint="trace it on positional ones")
    return tuple(args)
