"""Where a model's weights came from, to read one of them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

_KEY = "_qgraph_source"


class Source:
    """The files of a model, as `qg.lm.load` read them.

    Args:
        model: as it was read; of weights that are put in later nothing is known.
        load: reads it again, lazily.
    """

    def __init__(self, model: Any, load: Callable[[], Any]) -> None:
        self._load = load
        self._names = {id(array): (name, array) for name, array in _weights(model).items()}
        self._fresh: dict[str, mx.array] = {}

    @staticmethod
    def note(model: Any, load: Callable[[], Any]) -> None:
        """Let a model know its source."""
        vars(model)[_KEY] = Source(model, load)

    @staticmethod
    def of(model: Any) -> Source | None:
        found: Source | None = vars(model).get(_KEY)
        return found

    def reader(self, array: mx.array) -> Callable[[], mx.array] | None:
        """What reads this array of the model again, or None if it did not come from here."""
        name, known = self._names.get(id(array), ("", None))
        return (lambda: self._read(name)) if known is array else None

    def _read(self, name: str) -> mx.array:
        # Given away: whoever asks holds it alone, and it is let go with the part taken of it.
        if name not in self._fresh:
            self._fresh = _weights(self._load())
        return self._fresh.pop(name)


def _weights(model: Any) -> dict[str, mx.array]:
    found: Any = tree_flatten(model.parameters())
    return dict(found)
