"""`from_mlx` and `call`: capture a function's primitives and make nodes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from ..errors import UnsupportedError
from ..ir.graph import Graph, input_value
from ..tracing.constants import trace_constants
from ..tracing.misuse import refuse_misfit
from ..tracing.nodes import placeholder
from ..tracing.tensor import Tensor, as_tensor, has_tensor
from ..tracing.trace import argument_paths, in_program_order, parameter_names, tracing
from ..tracing.weights import note_all
from ..tree import Tree, flatten
from ..types import Spec, TensorType, type_of
from .capture import capture, title
from .replay import replay


def from_mlx(
    fn: Callable[..., Any], *examples: Any, name: str | None = None, **keywords: Any
) -> Graph:
    """The graph of an MLX function or module, for arguments like the examples.

    Shapes belong to the graph: for arguments of other shapes import again.

    Args:
        fn: takes and returns trees of arrays.  The weights of an `mlx.nn.Module` that it is, is
            bound to or sees as a variable become constants called by their path in the module;
            they are neither copied nor evaluated.
        examples: for each argument a tree of arrays or of `qg.spec`; numbers and strings belong to
            the graph.  Nothing is computed on them.
        name: of the graph.

    Raises:
        UnsupportedError: the function uses a primitive that MLX does not hand over, or evaluates
            an array; names it, the line and the way round.

    >>> import mlx.core as mx, qgraph as qg
    >>> graph = qg.from_mlx(lambda x: mx.tanh(x) * x, mx.ones((4,)), name="f")
    >>> print(graph.format(origins=False))
    graph f(x: f32[4]) -> f32[4]
      %0: f32[4] = tanh(x)
      %1: f32[4] = multiply(%0, x)
      return %1
    """
    _refuse_shapeless(fn, keywords)
    refuse_misfit(fn, examples, keywords)
    leaves, tree = flatten((examples, keywords), static=True)
    paths = argument_paths(tree, parameter_names(_signature(fn), examples))
    arrays = [_example(leaf, path) for leaf, path in zip(leaves, paths, strict=True)]
    inputs = [
        input_value(type_of(a), leaf.name or path, leaf.parameter)
        if isinstance(leaf, Spec)
        else input_value(type_of(a), path)
        for a, leaf, path in zip(arrays, leaves, paths, strict=True)
    ]
    with tracing() as known:
        outputs, out_tree = _import(fn, [Tensor(v) for v in inputs], arrays, tree)
        values = [as_tensor(t).value for t in outputs]
        weights = [*known.weights.values()]
    nodes = in_program_order(values, inputs)
    return Graph(
        name or title(fn), inputs, nodes, values, in_tree=tree, out_tree=out_tree, weights=weights
    )


def call(fn: Callable[..., Any], *tensors: Any, **keywords: Any) -> Any:
    """Call an MLX function or module on tensors of a graph being built.

    It is imported for their types, so that a module can be the body of a loop.  On arrays alone,
    outside of a trace, it is called as it is.

    >>> import mlx.core as mx, mlx.nn as nn, qgraph as qg
    >>> layer = nn.Linear(4, 4)
    >>> graph = qg.trace(lambda x: qg.fori_loop(0, 3, lambda i, h: qg.call(layer, h), x),
    ...                  qg.spec((1, 4)))
    >>> graph.nodes[-1].op
    'fori_loop'
    """
    if trace_constants.get() is None and not has_tensor((tensors, keywords)):
        return fn(*tensors, **keywords)
    leaves, tree = flatten((tensors, keywords), static=True)
    given = [as_tensor(leaf) for leaf in leaves]
    outputs, form = _import(fn, given, [placeholder(t.value.type) for t in given], tree)
    return form.build(outputs)


def _import(
    fn: Callable[..., Any], inputs: Sequence[Tensor], arrays: Sequence[mx.array], tree: Tree
) -> tuple[list[Any], Tree]:
    captured = capture(fn, arrays, tree)
    for module in captured.modules:
        note_all(module)
    return replay(captured, inputs, title(fn)), captured.form


def _example(leaf: Any, path: str) -> mx.array:
    if isinstance(leaf, Spec):
        return placeholder(leaf.type)
    if isinstance(leaf, TensorType):
        return placeholder(leaf)
    try:
        return leaf if isinstance(leaf, mx.array) else mx.array(leaf)
    except (TypeError, ValueError):
        raise UnsupportedError(
            f"from_mlx: argument {path} is a {type(leaf).__name__}, which is no tree of arrays",
            hint="pass the arrays in it, and make the object of them inside of the function",
        ) from None


def _signature(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn.__call__ if isinstance(fn, Module) else fn


def _refuse_shapeless(fn: Callable[..., Any], keywords: dict[str, Any]) -> None:
    if "shapeless" not in keywords:
        return
    try:
        takes = inspect.signature(_signature(fn)).parameters.values()
    except (TypeError, ValueError):
        return
    if not any(p.name == "shapeless" or p.kind == p.VAR_KEYWORD for p in takes):
        raise UnsupportedError(
            f"from_mlx: shapeless= is no argument of {title(fn)}, and a graph has its shapes",
            hint="leave it out, and import once for each shape; the graphs share their weights",
        )
