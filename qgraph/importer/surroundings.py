"""What a function uses besides its arguments: modules and arrays that it sees as variables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_unflatten

from ..tree import flatten


@dataclass
class Surroundings:
    """Modules and arrays that a function uses besides its arguments, by the names it has for them.

    The weights of modules are captured as inputs, so that they keep their names and that nothing
    of them is evaluated.
    """

    modules: dict[str, Module] = field(default_factory=dict)
    arrays: dict[str, mx.array] = field(default_factory=dict)

    @classmethod
    def of(cls, fn: Any) -> Surroundings:
        """What `fn` is, is bound to, or sees as a variable."""
        found = cls()
        if isinstance(fn, Module):
            found.modules[""] = fn
            return found
        if isinstance(fn, functools.partial):
            found._see([(f"x{i}", arg) for i, arg in enumerate(fn.args)])
            found._see(fn.keywords.items())
            fn = fn.func
        if isinstance(getattr(fn, "__self__", None), Module):
            found.modules[""] = fn.__self__
        try:
            seen = inspect.getclosurevars(inspect.unwrap(fn))
        except (TypeError, ValueError):
            return found
        found._see([*seen.globals.items(), *seen.nonlocals.items()])
        return found

    def _see(self, variables: Iterable[tuple[str, Any]]) -> None:
        for name, thing in variables:
            if isinstance(thing, Module):
                self.modules[name] = thing
            elif isinstance(thing, mx.array | dict | list | tuple):
                leaves, form = flatten(thing)
                paths = form.paths("" if isinstance(thing, dict) else name)
                pairs = zip(paths, leaves, strict=True)
                self.arrays |= {p: a for p, a in pairs if isinstance(a, mx.array)}

    @functools.cached_property
    def weights(self) -> dict[str, mx.array]:
        """Parameters of the modules by path."""
        found: dict[str, mx.array] = {}
        for name, module in self.modules.items():
            dot = f"{name}." if name else ""
            pairs: Any = tree_flatten(_parameters(module))
            found |= {dot + path: array for path, array in pairs}
        return found

    def paths(self) -> dict[int, str]:
        """The path of every module, by its identity."""
        found: dict[int, str] = {}
        for name, top in self.modules.items():
            for path, module in reversed(top.named_modules()):  # type: ignore[no-untyped-call]
                whole = ".".join(part for part in (name, path) if part)
                found[id(module)] = whole or type(module).__name__
        return found

    @contextmanager
    def holding(self, weights: Sequence[mx.array]) -> Iterator[None]:
        """The modules with other arrays for their weights, and then again as they were."""
        whole = [
            (module, dict(module), dict(vars(module)))
            for top in self.modules.values()
            for module in top.modules()  # type: ignore[no-untyped-call]
        ]
        given = dict(zip(self.weights, weights, strict=True))
        own = [(module, _parameters(module)) for module in self.modules.values()]
        for name, module in self.modules.items():
            dot = f"{name}." if name else ""
            mine = [(k.removeprefix(dot), a) for k, a in given.items() if k.startswith(dot)]
            module.update(tree_unflatten(mine), strict=False)
        try:
            yield
        finally:
            for module, parameters in own:
                module.update(parameters)
            # What the module kept of the captured call, such as a cache, goes with it.
            for module, items, attributes in whole:
                dict.clear(module)
                dict.update(module, items)
                vars(module).clear()
                vars(module).update(attributes)


def _parameters(module: Module) -> Any:
    return module.parameters()  # type: ignore[no-untyped-call]
