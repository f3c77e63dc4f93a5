"""Are a model's weights still those that a program was made of?"""

from __future__ import annotations

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
        self._holders: list[Any] = []
        self._keys: list[Any] = []
        self._things: list[Any] = []
        self._sizes: list[int] = []
        self._containers: list[Any] = []
        self._add(model)
        self._note(vars(model), "_training", model.training)

    def _add(self, holder: Any) -> None:
        self._containers.append(holder)
        self._sizes.append(len(holder))
        if isinstance(holder, Module):
            for name, number in vars(holder).items():
                if isinstance(number, float):  # such as the scale of an adapter
                    self._note(vars(holder), name, number)
        for key, thing in holder.items() if isinstance(holder, dict) else enumerate(holder):
            self._note(holder, key, thing)
            if isinstance(thing, dict | list | tuple):
                self._add(thing)

    def _note(self, holder: Any, key: Any, thing: Any) -> None:
        self._holders.append(holder)
        self._keys.append(key)
        self._things.append(thing)

    def unchanged(self) -> bool:
        """Some 30 ns a weight, so that every call can ask."""
        try:
            return (
                all(map(is_, map(getitem, self._holders, self._keys), self._things))
                and [*map(len, self._containers)] == self._sizes
            )
        except (KeyError, IndexError):
            return False
