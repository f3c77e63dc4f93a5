"""Tracing: a Python function called on symbolic tensors becomes a graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import TraceError
from ..ir.graph import Graph, Value, input_value, reachable
from ..tree import Tree, flatten
from ..types import Spec, TensorType, type_of
from .captured import name_captured
from .constants import Constants, constant_for, trace_constants
from .in_place import scope
from .left_operand import left_operands
from .misuse import checked_positions, drawing_told, explained, refuse_leaks, refuse_misfit
from .tensor import Tensor, as_tensor


def tensor(array: Any, name: str = "") -> Tensor:
    """A lazy tensor of known elements: the start of an expression.

    Args:
        array: an `mx.array`, or what `mx.array` takes.
        name: how prints call it.

    >>> import mlx.core as mx, qgraph as qg
    >>> (qg.tensor([1.0, 2.0]) @ qg.tensor([3.0, 4.0])).eval().item()
    11.0
    """
    if isinstance(array, Tensor):
        return Tensor(array.value)
    return Tensor(constant_for(array if isinstance(array, mx.array) else mx.array(array), name))


def keep(x: Any) -> Any:
    """`x` itself, held where it is: no pass moves it or fuses across it."""
    from .tensor import apply

    return apply("keep", (x,))


@contextmanager
def tracing() -> Iterator[Constants]:
    """While this is open constants are shared by identity; nested traces share with the outer."""
    if (known := trace_constants.get()) is not None:
        yield known
        return
    known = Constants()
    with sharing(known):
        yield known


@contextmanager
def sharing(constants: Constants) -> Iterator[None]:
    """Trace with these constants, so that several traces of a function have the same ones."""
    token = trace_constants.set(constants)
    try:
        with left_operands():
            yield
    finally:
        trace_constants.reset(token)


def parameter_names(fn: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    """A name for each positional argument, from the function's signature where it has one."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return [f"x{i}" for i in range(len(args))]
    names: list[str] = []
    for i in range(len(args)):
        if i < len(parameters) and parameters[i].kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD:
            names.append(parameters[i].name)
        else:
            star = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), "x")
            names.append(f"{star}.{i - sum(p.kind <= 1 for p in parameters)}")
    return names


def in_program_order(values: Sequence[Value], inputs: Sequence[Value]) -> list[Any]:
    """The nodes that `values` need, in the order in which the user's code made them."""
    return sorted(reachable(values, inputs), key=lambda node: node.serial)


def _leaf_spec(leaf: Any, path: str) -> Spec:
    if isinstance(leaf, Spec):
        return leaf
    if isinstance(leaf, TensorType):
        return Spec(leaf)
    if isinstance(leaf, mx.array):
        return Spec(type_of(leaf))
    if isinstance(leaf, np.ndarray):
        return Spec(type_of(mx.array(leaf)))
    if isinstance(leaf, Tensor):
        return Spec(leaf.value.type)
    raise TraceError(
        f"trace: argument {path} is a {type(leaf).__name__}",
        hint="describe arguments by qg.spec(shape, dtype), or give example arrays",
    )


def trace(
    fn: Callable[..., Any],
    *specs: Any,
    parameters: Sequence[int] = (),
    name: str | None = None,
    **keywords: Any,
) -> Graph:
    """Call `fn` on symbolic tensors and return the graph of what it computed.

    Args:
        fn: takes and returns trees (lists, tuples, dicts) of tensors; Python control flow unrolls.
        specs: for each argument a tree of `qg.spec`, example arrays, numbers or strings; numbers
            and strings are passed on as they are and belong to the graph.
        parameters: positions of arguments that hold weights, the same from call to call; what
            depends on them alone moves to `Program.prepare`.
        name: of the graph; by default that of `fn`.

    Raises:
        TraceError: `fn` needs the elements of a symbolic tensor, or leaks one; or it does not take
            the arguments described.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.tanh(x) * 2, qg.spec((4,)), name="f")
    >>> print(graph.format(origins=False))
    graph f(x: f32[4]) -> f32[4]
      %0: f32[4] = tanh(x)
      %1: f32[4] = multiply(%0, 2)
      return %1
    """
    refuse_misfit(fn, specs, keywords)
    names = parameter_names(fn, specs)
    leaves, tree = flatten((specs, keywords), static=True)
    paths = argument_paths(tree, names)
    positions = checked_positions(parameters, len(specs))
    held = {i for i, top in enumerate(_owners(tree)) if top in positions}
    inputs = []
    for i, (leaf, path) in enumerate(zip(leaves, paths, strict=True)):
        found = _leaf_spec(leaf, path)
        inputs.append(input_value(found.type, found.name or path, found.parameter or i in held))
    start = next_serial()
    called = name or getattr(fn, "__name__", type(fn).__name__).strip("<>")
    with tracing() as known, scope(called), drawing_told(fn, called):
        args, kwargs = tree.build([Tensor(v) for v in inputs])
        name_captured(fn)
        with explained():
            result = fn(*args, **kwargs)
        outputs, out_tree = flatten(result, static=True)
        values = [output_value(leaf, fn) for leaf in outputs]
        weights = [*known.weights.values()]
    nodes = in_program_order(values, inputs)
    refuse_leaks(nodes, start)
    return Graph(called, inputs, nodes, values, in_tree=tree, out_tree=out_tree, weights=weights)


def output_value(leaf: Any, fn: Callable[..., Any]) -> Value:
    if isinstance(leaf, Tensor | mx.array | np.ndarray):
        return as_tensor(leaf).value
    raise TraceError(
        f"{getattr(fn, '__name__', 'the function')} returned a {type(leaf).__name__}",
        hint="return tensors, or lists, tuples and dicts of them",
    )


def _owners(tree: Tree) -> list[int]:
    """For each leaf of a call's tree, the position of its argument, or -1 for a keyword's."""
    positional, keywords = tree.children
    owners = [i for i, arg in enumerate(positional.children) for _ in range(arg.count())]
    return owners + [-1] * keywords.count()


def argument_paths(tree: Tree, names: Sequence[str]) -> list[str]:
    positional, keywords = tree.children
    paths = [p for n, arg in zip(names, positional.children, strict=True) for p in arg.paths(n)]
    return paths + keywords.paths()


def trace_body(
    fn: Callable[..., Any], args: Sequence[Any], inputs: Sequence[Value], name: str, start: int
) -> tuple[Graph, list[Value]]:
    """Trace a loop body and close it: what it captured becomes inputs after its own.

    Args:
        args: what `fn` is called with, made of `inputs`.
        start: serial of the first node that belongs to the body.

    Returns:
        The closed graph, and the outer values that its last inputs stand for.
    """
    with scope(f"the {name} of a loop or branch"):
        name_captured(fn)
        given, form = flatten(args)
        result = fn(*form.build([Tensor(t.value) for t in given]))
    leaves, out_tree = flatten(result)
    outputs = [
        as_tensor(leaf).value if not isinstance(leaf, Tensor) else leaf.value for leaf in leaves
    ]
    own = {value.node for value in inputs}
    captured: dict[Value, Value] = {}
    local: dict[Value, Value] = {}
    nodes = []
    for node in in_program_order_within(outputs, own, start):
        for value in (*node.inputs,):
            _capture(value, own, start, captured, local)
        nodes.append(node)
    for value in outputs:
        _capture(value, own, start, captured, local)
    replace: dict[Value, Value] = {**captured, **local}
    closed = [constant.node for constant in local.values()]
    for node in nodes:
        new = node.with_inputs(replace)
        closed.append(new)
        replace.update(zip(node.outputs, new.outputs, strict=True))
    graph = Graph(
        name,
        [*inputs, *captured.values()],
        closed,
        [replace.get(v, v) for v in outputs],
        out_tree=out_tree,
    )
    return graph, list(captured)


def in_program_order_within(outputs: Sequence[Value], own: set[Any], start: int) -> list[Any]:
    """The body's own operations: made since `start`, needed by its outputs."""
    seen: set[Any] = set()
    pending = [value.node for value in outputs]
    while pending:
        node = pending.pop()
        if node in seen or node in own or _is_outer(node, start):
            continue
        seen.add(node)
        pending.extend(value.node for value in node.inputs)
    return sorted(seen, key=lambda node: node.serial)


def _is_outer(node: Any, start: int) -> bool:
    return bool(node.serial < start or node.op in ("constant", "input"))


def _capture(
    value: Value,
    own: set[Any],
    start: int,
    captured: dict[Value, Value],
    local: dict[Value, Value],
) -> None:
    """Note a value from outside: a number stays in the body, the rest become operands."""
    node = value.node
    if node in own or not _is_outer(node, start) or value in captured or value in local:
        return
    if node.op == "constant" and value.type.shape == ():
        local[value] = node.replace().output
    else:
        captured[value] = input_value(value.type, _hint(value))


def _hint(value: Value) -> str:
    return str(value.node.args.get("name", "")) if value.node.op in ("constant", "input") else ""


def next_serial() -> int:
    """The serial of a node made now; what has a smaller one was there before."""
    return input_value(TensorType((), mx.int32)).node.serial
