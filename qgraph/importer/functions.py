"""`from_mlx` and `call`: record a function's primitives and make nodes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import ShapeError, UnsupportedError
from ..ir import Graph, input_value
from ..tensor import Tensor, as_tensor, constant_for, placeholder
from ..trace import argument_paths, in_program_order, parameter_names, tracing
from ..tree import Tree, flatten
from ..types import Spec, TensorType, type_of
from .primitives import PRIMITIVES

Record = dict[str, Any]


def from_mlx(
    fn: Callable[..., Any], *examples: Any, name: str | None = None, **keywords: Any
) -> Graph:
    """The graph of an MLX function or module, for arguments like the examples.

    Args:
        fn: takes and returns trees of arrays.  The weights of an `mlx.nn.Module` become constants
            called by their path in the module; they are neither copied nor evaluated.
        examples: for each argument a tree of arrays or of `qg.spec`; numbers and strings belong to
            the graph.  Nothing is computed on them.
        name: of the graph.

    Raises:
        UnsupportedError: the function uses a primitive that MLX does not hand over, or evaluates
            an array; names it.

    >>> import mlx.core as mx, qgraph as qg
    >>> graph = qg.from_mlx(lambda x: mx.tanh(x) * 2, mx.ones((4,)), name="f")
    >>> print(graph.format(origins=False))
    graph f(x: f32[4]) -> f32[4]
      %0: f32[4] = tanh(x)
      %1: f32[4] = multiply(%0, 2)
      return %1
    """
    leaves, tree = flatten((examples, keywords), static=True)
    arrays = [_example(leaf) for leaf in leaves]
    paths = argument_paths(tree, parameter_names(_signature(fn), examples))
    inputs = [input_value(type_of(a), path) for a, path in zip(arrays, paths, strict=True)]
    with tracing():
        outputs, out_tree = _replay(fn, [Tensor(v) for v in inputs], arrays, tree)
        values = [as_tensor(t).value for t in outputs]
    title = name or _title(fn)
    nodes = in_program_order(values, inputs)
    return Graph(title, inputs, nodes, values, in_tree=tree, out_tree=out_tree)


def call(fn: Callable[..., Any], *tensors: Any, **keywords: Any) -> Any:
    """Call an MLX function or module on tensors of a graph being built.

    It is imported for their types, so that a module can be the body of a loop.

    >>> import mlx.core as mx, mlx.nn as nn, qgraph as qg
    >>> layer = nn.Linear(4, 4)
    >>> graph = qg.trace(lambda x: qg.fori_loop(0, 3, lambda i, h: qg.call(layer, h), x),
    ...                  qg.spec((1, 4)))
    >>> graph.nodes[-1].op
    'fori_loop'
    """
    leaves, tree = flatten((tensors, keywords), static=True)
    given = [as_tensor(leaf) for leaf in leaves]
    outputs, form = _replay(fn, given, [placeholder(t.value.type) for t in given], tree)
    return form.build(outputs)


def _example(leaf: Any) -> mx.array:
    if isinstance(leaf, Spec):
        return placeholder(leaf.type)
    if isinstance(leaf, TensorType):
        return placeholder(leaf)
    return leaf if isinstance(leaf, mx.array) else mx.array(leaf)


def _title(fn: Any) -> str:
    return str(getattr(fn, "__name__", fn.__class__.__name__)).strip("<>")


def _signature(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn.__call__ if isinstance(fn, Module) else fn


def _replay(
    fn: Callable[..., Any], inputs: Sequence[Tensor], arrays: Sequence[mx.array], tree: Tree
) -> tuple[list[Any], Tree]:
    """Record what `fn` does to arrays like `inputs`, and do it to `inputs`."""
    weights: dict[str, mx.array] = {}
    if isinstance(fn, Module):
        weights = dict(tree_flatten(fn.parameters()))  # type: ignore[no-untyped-call]
    records, out_tree = _record(fn, weights, arrays, tree)
    env: dict[str, Any] = {}
    names = iter([*weights, *inputs])
    for record in records:
        kind = record["type"]
        if kind == "inputs":
            for key, _, _ in record["inputs"]:
                given = next(names)
                env[key] = _weight(weights[given], given) if isinstance(given, str) else given
        elif kind == "constants":
            env.update((key, as_tensor(array)) for key, array in record["constants"])
        elif kind == "primitive":
            _make(record, env, fn)
    (last,) = [record for record in records if record["type"] == "outputs"]
    return [env[key] for key, _, _ in last["outputs"]], out_tree


def _weight(array: mx.array, path: str) -> Tensor:
    return Tensor(constant_for(array, path))


def _record(
    fn: Callable[..., Any], weights: dict[str, mx.array], arrays: Sequence[mx.array], tree: Tree
) -> tuple[list[Record], Tree]:
    """The records of the export, weights handed in as inputs so that they keep their names."""
    records: list[Record] = []
    forms: list[Tree] = []

    def flat(*given: mx.array) -> list[mx.array]:
        with _with_weights(fn, dict(zip(weights, given, strict=False))):
            args, kwargs = tree.build(given[len(weights) :])
            leaves, form = flatten(fn(*args, **kwargs), static=True)
        forms.append(form)
        return leaves

    random: Any = mx.random.state
    high, low = random[0].tolist()
    try:
        with _patched():
            mx.export_function(records.append, flat, *weights.values(), *arrays)
    except ValueError as error:
        raise _refused(str(error), fn) from None
    finally:
        # A key is the two halves of a seed, so this is the state as it was.
        mx.random.seed((high << 32) | low)
    return records, forms[-1]


@contextmanager
def _with_weights(fn: Any, weights: dict[str, mx.array]) -> Iterator[None]:
    """The module with other arrays for its weights, and then again its own."""
    if not weights:
        yield
        return
    own = fn.parameters()
    fn.update(tree_unflatten(list(weights.items())))
    try:
        yield
    finally:
        fn.update(own)


@contextmanager
def _patched() -> Iterator[None]:
    """What MLX cannot hand over but something else says as well, said that way for the while."""
    said: list[tuple[Any, str, Callable[..., Any]]] = [
        (mx, "contiguous", lambda a, *_, **__: a),
        (mx, "bitwise_invert", lambda a, **_: _inverted(a)),
        (mx.array, "__invert__", _inverted),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in said]
    try:
        for owner, name, function in said:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _inverted(a: mx.array) -> mx.array:
    if a.dtype == mx.bool_:
        return mx.logical_not(a)
    return mx.bitwise_xor(a, mx.array(-1).astype(a.dtype))


def _refused(words: str, fn: Any) -> UnsupportedError:
    found = re.search(r"primitive (\w+)", words)
    if found:
        return UnsupportedError(
            f"from_mlx: {_title(fn)} uses {found[1]}, which MLX does not hand over",
            hint="compute what needs it outside of the function and pass the result in",
        )
    if "eval" in words.lower():
        return UnsupportedError(
            f"from_mlx: {_title(fn)} evaluates an array while it is imported",
            hint="leave out mx.eval, .item() and Python conditions on arrays",
        )
    return UnsupportedError(f"from_mlx: {_title(fn)}: {words}")


def _make(record: Record, env: dict[str, Any], fn: Any) -> None:
    """Add what a primitive gives to `env`."""
    name = record["name"]
    entry = PRIMITIVES.get(name)
    if entry is None:
        raise UnsupportedError(
            f"from_mlx: {_title(fn)} uses the primitive {name}, which has no entry in the table",
            hint="write that part in qgraph's ops, or pass its result in",
        )
    types = [TensorType(tuple(shape), dtype) for _, shape, dtype in record["outputs"]]
    try:
        result = entry([env[key] for key, _, _ in record["inputs"]], record["arguments"], types)
    except (NotImplementedError, ShapeError) as error:
        raise UnsupportedError(f"from_mlx: {_title(fn)} uses {name}: {error}") from None
    outputs = result if isinstance(result, list | tuple) else [result]
    for (key, _, _), tensor, stated in zip(record["outputs"], outputs, types, strict=True):
        if tensor.value.type != stated:
            raise UnsupportedError(
                f"from_mlx: {name} gave {tensor.value.type}, MLX says {stated}",
                hint="this is a fault of qgraph's table of primitives; please report it",
            )
        env[key] = tensor
