"""Are a model's weights still those that a program was made of?"""

from __future__ import annotations

from itertools import chain
from operator import getitem, is_
from typing import Any

from mlx.nn.layers.base import Module


class Watch:
    """The arrays and modules of a model as they were, compared by identity at every call.

    `load_weights`, `update`, `set_dtype`, adapters put in or fused: each puts other objects into
    the dicts and lists that a model is made of.  An array written to in place stays the object it
    was, and is not noticed.
    """

    def __init__(self, model: Module) -> None:
        self._containers: list[Any] = []
        self._sizes: list[int] = []
        self._things: list[Any] = []
        self._settings: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._add(model)
        self._note(model, "_training")

    def _add(self, container: Any) -> None:
        things = container.values() if isinstance(container, dict) else container
        self._containers.append(things)  # a view of a dict shows what is in it now
        self._sizes.append(len(things))
        self._things += things
        if isinstance(container, Module):
            for name, number in vars(container).items():
                if isinstance(number, float):  # such as the scale of an adapter
                    self._note(container, name)
        for thing in things:
            if isinstance(thing, dict | list | tuple):
                self._add(thing)

    def _note(self, module: Module, name: str) -> None:
        self._settings.append(vars(module))
        self._names.append(name)
        self._values.append(vars(module)[name])

    def unchanged(self) -> bool:
        """Some 20 ns a weight, so that every call can ask."""
        try:
            return (
                [*map(len, self._containers)] == self._sizes
                and all(map(is_, chain.from_iterable(self._containers), self._things))
                and all(map(is_, map(getitem, self._settings, self._names), self._values))
            )
        except (KeyError, RuntimeError):  # or another thread is changing it
            return False
