"""A copy of a model's modules over the same arrays, to be traced."""

from __future__ import annotations

from typing import Any

from mlx.nn.layers.base import Module


def shadow(model: Module) -> Module:
    """The model's modules again, each a new object; arrays and all else are the model's own.

    While a model is imported its modules hold placeholders, and an override may change them; the
    model itself can run meanwhile, in another thread.
    """
    copies: dict[int, Any] = {}

    def copied(thing: Any) -> Any:
        if not isinstance(thing, dict | list | tuple):
            return thing
        if id(thing) in copies:
            return copies[id(thing)]
        if isinstance(thing, tuple):
            return tuple(map(copied, thing)) if type(thing) is tuple else thing
        copy: Any = type(thing).__new__(type(thing))  # type: ignore[type-var]
        copies[id(thing)] = copy
        if isinstance(thing, list):
            copy.extend(map(copied, thing))
            return copy
        dict.update(copy, {key: copied(value) for key, value in thing.items()})
        if isinstance(thing, Module):
            vars(copy).update({k: v for k, v in vars(thing).items() if k != "qgraph"})
            for name, value in vars(thing).items():
                if isinstance(value, Module):  # a module kept out of the parameters
                    vars(copy)[name] = copied(value)
        return copy

    found: Module = copied(model)
    return found
