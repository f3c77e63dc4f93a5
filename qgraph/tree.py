"""Trees of lists, tuples and dicts, as `mlx.core.compile` takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tree:
    """The form of a tree without its leaves.

    >>> leaves, form = flatten({"a": 1, "b": (2, [3])})
    >>> leaves, form.build(["x", "y", "z"])
    ([1, 2, 3], {'a': 'x', 'b': ('y', ['z'])})
    """

    kind: str  # "leaf", "none", "static", "list", "tuple" or "dict"
    keys: tuple[Any, ...] = ()
    children: tuple[Tree, ...] = ()

    def build(self, leaves: Any) -> Any:
        """The tree of this form that holds `leaves`, in order."""
        rest = iter(leaves)
        return self._build(rest)

    def _build(self, leaves: Iterator[Any]) -> Any:
        if self.kind == "leaf":
            return next(leaves)
        if self.kind == "none":
            return None
        if self.kind == "static":
            return self.keys[0]
        parts = [child._build(leaves) for child in self.children]
        if self.kind == "dict":
            return dict(zip(self.keys, parts, strict=True))
        return parts if self.kind == "list" else tuple(parts)

    def count(self) -> int:
        """Number of leaves."""
        return 1 if self.kind == "leaf" else sum(child.count() for child in self.children)

    def paths(self, prefix: str = "") -> list[str]:
        """A dotted name for every leaf, as `mlx.utils.tree_flatten` gives."""
        if self.kind == "leaf":
            return [prefix]
        names = self.keys if self.kind == "dict" else range(len(self.children))
        dot = f"{prefix}." if prefix else ""
        return [
            path
            for name, child in zip(names, self.children, strict=False)
            for path in child.paths(f"{dot}{name}")
        ]


LEAF = Tree("leaf")
NONE = Tree("none")


STATIC = (bool, int, float, complex, str, bytes)


def flatten(tree: Any, *, static: bool = False) -> tuple[list[Any], Tree]:
    """Leaves of `tree` in order, and its form.  None holds no leaf.

    With `static`, Python numbers and strings belong to the form instead of being leaves.
    """
    leaves: list[Any] = []
    return leaves, _form(tree, leaves, static)


def _form(part: Any, leaves: list[Any], static: bool) -> Tree:
    # No closure over `leaves`: one that calls itself would hold the arrays until Python's garbage
    # collector comes by, and MLX copies a buffer that something holds.
    if part is None:
        return NONE
    if static and isinstance(part, STATIC):
        return Tree("static", (part,))
    if isinstance(part, dict):
        return Tree("dict", tuple(part), tuple(_form(part[k], leaves, static) for k in part))
    if isinstance(part, tuple | list):
        kind = "list" if isinstance(part, list) else "tuple"
        return Tree(kind, (), tuple(_form(item, leaves, static) for item in part))
    leaves.append(part)
    return LEAF


def tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with `fn` applied to every leaf."""
    leaves, form = flatten(tree)
    return form.build([fn(leaf) for leaf in leaves])
