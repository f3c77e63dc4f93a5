"""Forms of trees in JSON: `[kind, keys, children]`, and the name of a class where there is one."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

from ..tree import Static, Tree

_PLAIN = {"leaf": 0, "none": 0, "static": 1}
"""Kinds without children, and how many keys stand for their value."""


def write_tree(tree: Tree) -> list[Any]:
    """What JSON holds of a form; what it cannot hold is written for readers and not read again."""
    keys = [tree.static.value] if tree.kind == "static" and tree.static else tree.keys
    found = [tree.kind, [_written(key) for key in keys], [write_tree(c) for c in tree.children]]
    return found if tree.cls is None else [*found, f"{tree.cls.__module__}:{tree.cls.__qualname__}"]


def unreadable(tree: Tree) -> str | None:
    """Why a file cannot hold a form, in words; None if it can."""
    if tree.kind == "module":
        return "it is an mlx.nn module; take its parameters as an argument, or return them"
    others = [key for key in tree.keys if "$other" in str(_written(key))]
    if others:
        return f"its key {others[0]!r} has no form in a file; name it by a text or a number"
    return next((why for child in tree.children if (why := unreadable(child))), None)


def read_tree(data: Any) -> Tree:
    """The form that `write_tree` wrote.

    Classes are looked up among the modules that are imported; nothing is imported for a file.

    Raises:
        ValueError, TypeError: it is no form.
    """
    kind, keys, children, *rest = data
    found = tuple(map(read_tree, children))
    keys = tuple(map(_read, keys))
    count = len(found) if kind in ("dict", "namedtuple", "dataclass") else _PLAIN.get(kind, 0)
    if len(keys) != count or (kind in _PLAIN and found) or len(rest) > 1:
        raise ValueError(f"a tree of kind {kind!r} with {keys} and {len(found)} parts")
    if kind == "static":
        return Tree("static", static=Static(keys[0]))
    if kind not in (*_PLAIN, "list", "tuple", "dict", "namedtuple", "dataclass"):
        raise ValueError(f"no file holds a tree of kind {kind!r}")
    cls = _class(kind, rest[0], keys) if rest else None
    if cls is None and kind in ("namedtuple", "dataclass"):
        raise ValueError(f"a {kind} without its class")
    return Tree(kind, keys, found, cls)


def _written(key: Any) -> Any:
    if type(key) is float and not math.isfinite(key):
        return {"$float": str(key)}
    if key is None or type(key) in (bool, int, float, str):
        return key
    if type(key) is complex:
        return {"$complex": [_written(key.real), _written(key.imag)]}
    if type(key) is tuple:
        return {"$tuple": [_written(part) for part in key]}
    return {"$bytes": key.hex()} if type(key) is bytes else {"$other": repr(key)}


def _read(data: Any) -> Any:
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, dict) and len(data) == 1:
        ((kind, given),) = data.items()
        if kind == "$float":
            return float(given)
        if kind == "$complex":
            real, imaginary = map(_read, given)
            return complex(real, imaginary)
        if kind == "$tuple":
            return tuple(map(_read, given))
        if kind == "$bytes":
            return bytes.fromhex(given)
    raise TypeError(f"{str(data)[:40]} where a name or a number stands")


def _class(kind: str, name: str, fields: tuple[Any, ...]) -> type[Any]:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    own: Any = None
    if isinstance(found, type) and kind == "dataclass" and dataclasses.is_dataclass(found):
        own = tuple(field.name for field in dataclasses.fields(found))
    elif isinstance(found, type) and issubclass(found, tuple):
        own = getattr(found, "_fields", ())
    if own != fields:
        raise ValueError(f"there is no {kind} {name} with the fields {fields}: import its module")
    cls: type[Any] = found
    return cls
