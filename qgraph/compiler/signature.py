"""How the arguments of a call reach the inputs of a graph: by their paths, whatever their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError, TraceError
from ..ir.graph import Graph, Value
from ..tracing.tensor import Tensor
from ..tree import LEAF, Mismatch, Tree
from ..types import type_of


@dataclass(frozen=True)
class Signature:
    """What a graph, or a part of a call, takes.

    Attributes:
        name: of the graph, for messages.
        form: of `(args, kwargs)`.
        inputs: one for each leaf of the form, in its order.
        roots: what each positional argument is called.
    """

    name: str
    form: Tree
    inputs: tuple[Value, ...]
    roots: tuple[str, ...]

    @staticmethod
    def of(graph: Graph) -> Signature:
        """That of a graph; one made by hand takes its inputs in their order."""
        form = graph.in_tree or plain_form(len(graph.inputs))
        return Signature(graph.name, form, graph.inputs, _roots(form, graph.inputs))

    def arrange(self, form: Tree, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Arrays given in a tree of the form `form`, in the order of the inputs.

        Raises:
            InputError: a path is missing or one too many, or holds an array of another type.
        """
        try:
            places = self._places(form)
        except Mismatch as error:
            raise InputError(f"{self.name}: {error}", hint=f"it takes {self}") from None
        found = [arrays[place] for place in places]
        wrong = [
            f"{value.node.args['name']} is {type_of(array)}, not {value.type}"
            for value, array in zip(self.inputs, found, strict=True)
            if value.type != type_of(array)
        ]
        if wrong:
            raise InputError(
                f"{self.name}: {'; '.join(wrong)}",
                hint="cast or reshape the arguments, or use qgraph.jit, which compiles for each "
                "type",
            )
        return found

    def _places(self, form: Tree) -> list[int]:
        (wanted, keywords), (given, _) = self.form.children, form.children
        if len(wanted.children) != len(given.children):
            count, more = len(wanted.children), len(given.children)
            raise Mismatch(
                f"it takes {count} positional argument{'s' * (count != 1)}, "
                f"{more} {'was' if more == 1 else 'were'} given"
            )
        named = Tree("dict", self.roots, wanted.children)
        places = named.places(Tree("dict", named.keys, given.children))
        first = given.count()
        return [*places, *(first + place for place in keywords.places(form.children[1]))]

    def halves(self) -> tuple[Signature, Signature]:
        """What is prepared, and what is given at each call.

        An argument that holds parameters alone is prepared, with the numbers in it; one without
        stays whole.
        """
        flags = iter([bool(value.node.args["parameter"]) for value in self.inputs])
        args, keywords = self.form.children
        pairs = [_halves(child, flags) for child in (*args.children, *keywords.children)]
        halves = []
        for side in (0, 1):
            chosen = [pair[side] for pair in pairs]
            positional = [half for half in chosen[: len(args.children)] if half is not None]
            named = [
                (key, half)
                for key, half in zip(keywords.keys, chosen[len(args.children) :], strict=True)
                if half is not None
            ]
            form = Tree("tuple", (), (Tree("tuple", (), tuple(positional)), _dict(named)))
            inputs = [v for v in self.inputs if bool(v.node.args["parameter"]) is (side == 0)]
            roots = [root for root, half in zip(self.roots, chosen, strict=False) if half]
            halves.append(Signature(self.name, form, tuple(inputs), tuple(roots)))
        return halves[0], halves[1]

    def __str__(self) -> str:
        """The arguments as they would be written, such as `(params: {w: f32[4]}, n=3)`."""
        args, keywords = self.form.children
        types = iter([str(value.type) for value in self.inputs])
        parts = [f"{n}: {a.words(types)}" for n, a in zip(self.roots, args.children, strict=True)]
        parts += [
            f"{n}={a.words(types)}" for n, a in zip(keywords.keys, keywords.children, strict=True)
        ]
        return f"({', '.join(parts)})"


def _roots(form: Tree, inputs: Sequence[Value]) -> tuple[str, ...]:
    """What each positional argument is called, by the names of its inputs."""
    names = iter([str(value.node.args["name"]) for value in inputs])
    roots: list[str] = []
    for number, child in enumerate(form.children[0].children, 1):
        paths = child.paths()
        own = [next(names) for _ in paths]
        root = own[0].removesuffix(paths[0]).rstrip(".") if own else ""
        roots.append(root if root and root not in roots else f"argument {number}")
    return tuple(roots)


def plain_form(count: int) -> Tree:
    """The form of a call with `count` arrays and nothing else."""
    return Tree("tuple", (), (Tree("tuple", (), (LEAF,) * count), _dict([])))


def _dict(items: Sequence[tuple[Any, Tree]]) -> Tree:
    return Tree("dict", tuple(key for key, _ in items), tuple(child for _, child in items))


def _halves(tree: Tree, flags: Any) -> tuple[Tree | None, Tree | None]:
    """The part of `tree` that holds parameters, and the rest; `flags` tells them leaf by leaf."""
    if tree.kind == "leaf":
        return (tree, None) if next(flags) else (None, tree)
    pairs = [_halves(child, flags) for child in tree.children]
    if not any(kept for kept, _ in pairs):
        return None, tree
    if all(rest is None or not rest.count() for _, rest in pairs):
        return tree, None
    named = list(zip(tree.names, pairs, strict=True))
    if tree.kind in ("list", "tuple"):
        sides = [tuple(p[i] for p in pairs if p[i] is not None) for i in (0, 1)]
        return Tree(tree.kind, (), sides[0]), Tree(tree.kind, (), sides[1])  # type: ignore[arg-type]
    return (
        _dict([(name, kept) for name, (kept, _) in named if kept is not None]),
        _dict([(name, rest) for name, (_, rest) in named if rest is not None]),
    )


def as_arrays(leaves: Sequence[Any]) -> list[mx.array]:
    """The leaves of a call as arrays; NumPy's are taken too.

    Raises:
        InputError: one is no array.
        TraceError: one is symbolic.
    """
    arrays = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            raise TraceError(
                "a program was called on a symbolic tensor",
                hint="programs take arrays; inside a trace call the function itself",
            )
        if isinstance(leaf, np.ndarray | np.generic):
            arrays.append(mx.array(np.asarray(leaf)))
        elif isinstance(leaf, mx.array):
            arrays.append(leaf)
        else:
            raise InputError(
                f"a program takes arrays, not {type(leaf).__name__}", hint="pass mx.array(...)"
            )
    return arrays
