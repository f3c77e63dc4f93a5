"""Trees: lists, tuples and dicts as `mlx.core.compile` takes them, named tuples, dataclasses and
modules.

A leaf is known by its path, never by its position: `Tree.places` finds the leaves of one tree in
another whose keys come in another order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from .types import Spec, TensorType

STATIC = (bool, int, float, complex, str, bytes)


class Mismatch(ValueError):
    """Two trees of different forms; the text names the path."""


class Static:
    """Something that belongs to a form: 1 is neither 1.0 nor True, and 0.0 is not -0.0.

    >>> Static(1) == Static(1), Static(1) == Static(1.0), Static(0.0) == Static(-0.0)
    (True, False, False)
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and _same(self.value, other.value)

    def __hash__(self) -> int:
        value = self.value
        return hash(tuple(value) if isinstance(value, dict) else (type(value), repr(value)))

    def __repr__(self) -> str:
        return repr(self.value)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, float | complex):
        return repr(a) == repr(b)
    try:
        return bool(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b)
    except (TypeError, ValueError):
        return False


class Tree(NamedTuple):
    """The form of a tree without its leaves; a tuple, since a call makes and compares one.

    Attributes:
        kind: "leaf", "none", "static", "list", "tuple", "dict", "namedtuple", "dataclass" or
            "module".
        keys: of a dict or a module its keys, else the names of the fields.
        children: in the order of the keys.
        cls: the class of a named tuple, a dataclass or a module, or of a tuple of its own.
        static: the value of a static; the attributes of a module that hold no arrays.

    >>> leaves, form = flatten({"a": 1, "b": (2, [3])})
    >>> leaves, form.build(["x", "y", "z"])
    ([1, 2, 3], {'a': 'x', 'b': ('y', ['z'])})
    """

    kind: str
    keys: tuple[Any, ...] = ()
    children: tuple[Tree, ...] = ()
    cls: type[Any] | None = None
    static: Static | None = None

    def build(self, leaves: Iterable[Any]) -> Any:
        """The tree of this form that holds `leaves`, in order."""
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        if self.kind == "leaf":
            return next(leaves)
        if self.kind == "none":
            return None
        if self.kind == "static":
            assert self.static is not None
            return self.static.value
        parts = [child._build(leaves) for child in self.children]
        if self.kind == "list":
            return parts
        if self.cls is None:
            return (
                tuple(parts) if self.kind == "tuple" else dict(zip(self.keys, parts, strict=True))
            )
        if self.kind == "tuple":
            return self.cls(parts)
        return self.cls(*parts) if self.kind == "namedtuple" else self._object(parts)

    def _object(self, parts: list[Any]) -> Any:
        """A dataclass or a module, made without its constructor, which may want real arrays."""
        cls: Any = self.cls
        made = cls.__new__(cls)
        if self.kind == "dataclass":
            for name, part in zip(self.keys, parts, strict=True):
                object.__setattr__(made, name, part)
            return made
        assert self.static is not None
        dict.update(made, zip(self.keys, parts, strict=True))
        vars(made).update(self.static.value)
        return made

    def count(self) -> int:  # type: ignore[override]
        """Number of leaves."""
        return 1 if self.kind == "leaf" else sum(child.count() for child in self.children)

    @property
    def names(self) -> Sequence[Any]:
        """What each child is called in a path."""
        return range(len(self.children)) if self.kind in ("list", "tuple") else self.keys

    def paths(self, prefix: str = "") -> list[str]:
        """A dotted name for every leaf, as `mlx.utils.tree_flatten` gives."""
        if self.kind == "leaf":
            return [prefix]
        named = zip(self.names, self.children, strict=False)
        return [path for name, child in named for path in child.paths(_below(prefix, name))]

    def places(self, other: Tree, path: str = "") -> list[int]:
        """For each leaf of this form, which leaf of a tree of the form `other` has its path.

        Raises:
            Mismatch: the forms differ in more than the order of keys.

        >>> _, ours = flatten({"w": 1, "b": 2})
        >>> _, theirs = flatten({"b": 2, "w": 1})
        >>> ours.places(theirs)
        [1, 0]
        """
        found: list[int] = []
        self._find(other, 0, path, found)
        return found

    def _find(self, other: Tree, start: int, path: str, found: list[int]) -> None:
        if (self.kind, self.cls, self.static) != (other.kind, other.cls, other.static):
            raise Mismatch(f"{path or 'it'} is {other}, not {self}")
        if self.kind == "leaf":
            found.append(start)
        theirs = {}
        for name, child in zip(other.names, other.children, strict=False):
            theirs[name] = child, start
            start += child.count()
        if missing := [name for name in self.names if name not in theirs]:
            raise Mismatch(f"{_below(path, missing[0])} is missing")
        if more := [name for name in theirs if name not in self.names]:
            raise Mismatch(f"{_below(path, more[0])} is one too many")
        for name, child in zip(self.names, self.children, strict=False):
            child._find(*theirs[name], _below(path, name), found)

    def sorted(self) -> Tree:
        """This form with the keys of dicts and modules in one order, that of their names."""
        named = list(zip(self.names, self.children, strict=False))
        if self.kind in ("dict", "module"):
            named.sort(key=lambda item: (type(item[0]).__name__, repr(item[0])))
        keys = tuple(name for name, _ in named) if self.keys else ()
        children = tuple(child.sorted() for _, child in named)
        return self._replace(keys=keys, children=children)

    def words(self, leaves: Iterator[str]) -> str:
        """The form with words for its leaves, such as `{w: f32[4], b: [f32[1], 2]}`."""
        if self.kind == "leaf":
            return next(leaves)
        if self.kind in ("none", "static"):
            return repr(self.static)
        parts = [child.words(leaves) for child in self.children]
        if self.kind not in ("list", "tuple"):
            parts = [f"{name}: {part}" for name, part in zip(self.keys, parts, strict=True)]
        inside = ", ".join(parts)
        if self.cls is not None:
            return f"{self.cls.__name__}({inside})"
        return {"list": f"[{inside}]", "dict": f"{{{inside}}}"}.get(self.kind, f"({inside})")

    def __str__(self) -> str:
        return self.words(repeat("array"))


def _below(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


LEAF = Tree("leaf")
NONE = Tree("none")


def flatten(tree: Any, *, static: bool = False) -> tuple[list[Any], Tree]:
    """Leaves of `tree` in order, and its form.  None holds no leaf.

    With `static`, Python numbers and strings belong to the form instead of being leaves; in a
    module they do always.
    """
    leaves: list[Any] = []
    return leaves, _visit(tree, static, leaves)


def _visit(part: Any, static: bool, leaves: list[Any]) -> Tree:
    kind = type(part)  # asked first: a call comes through here
    if kind is mx.array:
        leaves.append(part)
        return LEAF
    if kind is dict:
        return Tree("dict", tuple(part), _all(part.values(), static, leaves))
    if kind is list or kind is tuple:
        return Tree("list" if kind is list else "tuple", (), _all(part, static, leaves))
    if part is None:
        return NONE
    if static and isinstance(part, STATIC):
        return Tree("static", static=Static(part.item() if isinstance(part, np.generic) else part))
    return _visit_other(part, static, leaves)


def _all(parts: Iterable[Any], static: bool, leaves: list[Any]) -> tuple[Tree, ...]:
    return tuple([_visit(part, static, leaves) for part in parts])


def _visit_other(part: Any, static: bool, leaves: list[Any]) -> Tree:
    """Modules, dataclasses, and what is a dict, a list or a tuple by descent."""
    if isinstance(part, Module):
        children = _all([dict.__getitem__(part, key) for key in part], True, leaves)
        return Tree("module", tuple(part), children, type(part), Static(dict(vars(part))))
    if isinstance(part, dict):
        return Tree("dict", tuple(part), _all([part[key] for key in part], static, leaves))
    if isinstance(part, list):
        return Tree("list", (), _all(part, static, leaves))
    if isinstance(part, tuple):
        fields = getattr(part, "_fields", None)
        kind = "tuple" if fields is None else "namedtuple"
        return Tree(kind, fields or (), _all(part, static, leaves), type(part))
    described = isinstance(part, Spec | TensorType | type)
    if dataclasses.is_dataclass(part) and not described:
        names = tuple(field.name for field in dataclasses.fields(part))
        parts = [getattr(part, name) for name in names]
        return Tree("dataclass", names, _all(parts, static, leaves), type(part))
    leaves.append(part)
    return LEAF


def tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with `fn` applied to every leaf."""
    leaves, form = flatten(tree)
    return form.build([fn(leaf) for leaf in leaves])
