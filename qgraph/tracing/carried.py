"""What goes into the body of a loop or branch and comes out of it, matched by path."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import mlx.core as mx

from ..errors import ControlFlowError
from ..ir.graph import Graph, Value, input_value
from ..tree import Mismatch, Tree, flatten, tree_map
from .tensor import Tensor, as_tensor


def own_arrays(tree: Any) -> Any:
    """The arrays of `tree` as other arrays: a body that changes them in place changes no others."""
    return tree_map(lambda leaf: copy(leaf) if isinstance(leaf, mx.array) else leaf, tree)


def carried_values(op: str, tree: Any) -> tuple[list[Value], Tree]:
    """The values of a carried tree, and its form."""
    leaves, form = flatten(tree)
    for leaf in leaves:
        if isinstance(leaf, str | bytes):
            raise ControlFlowError(f"{op}: cannot carry {leaf!r}", hint="carry arrays and numbers")
    return [as_tensor(leaf).value for leaf in leaves], form


def inputs_like(values: Sequence[Value], form: Tree, name: str) -> list[Value]:
    """Inputs of a body for `values`, named by their paths."""
    paths = form.paths(name)
    return [input_value(v.type, path) for v, path in zip(values, paths, strict=True)]


def tensors(form: Tree, values: Sequence[Value]) -> Any:
    """The tree of `form` with `values` in it, as users see them."""
    return form.build([Tensor(v) for v in values])


def with_stable_carry(
    op: str, form: Tree, carried: Sequence[Value], body: Graph, out: Tree
) -> Graph:
    """The body, its first outputs in the order of what is carried: they are matched by path.

    Raises:
        ControlFlowError: they come back with another tree or other types than they went in with.
    """
    try:
        places = form.places(out, "carry")
    except Mismatch as error:
        raise ControlFlowError(
            f"{op}: the body takes {form} and returns {out}: {error}",
            hint="return the carried values in the form in which they came",
        ) from None
    outputs = [body.outputs[place] for place in places]
    for path, before, after in zip(form.paths("carry"), carried, outputs, strict=True):
        if before.type != after.type:
            what = "shape" if before.shape != after.shape else "dtype"
            raise ControlFlowError(
                f"{op}: {path} goes in as {before.type} and comes out as {after.type}: "
                f"its {what} changes from turn to turn",
                hint=f"cast or reshape it in the body, or start from a {after.type}",
            )
    return body.replace(outputs=[*outputs, *body.outputs[len(outputs) :]])


def out_tree(body: Graph) -> Tree:
    """The form of what a traced body returns."""
    assert body.out_tree is not None
    return body.out_tree


def with_same_results(true: Graph, false: Graph) -> Graph:
    """The branch when false, its outputs in the order of the other's: they are matched by path."""
    form = out_tree(true)
    try:
        places = form.places(out_tree(false), "result")
    except Mismatch as error:
        raise ControlFlowError(
            f"cond: the branches return different trees: {form} when true, {out_tree(false)} when "
            f"false: {error}",
            hint="return the same form from both",
        ) from None
    outputs = [false.outputs[place] for place in places]
    for path, a, b in zip(form.paths("result"), true.outputs, outputs, strict=True):
        if a.type != b.type:
            raise ControlFlowError(
                f"cond: {path} is {a.type} when true and {b.type} when false",
                hint="cast or reshape one of them",
            )
    return false.replace(outputs=outputs, out_tree=form)
