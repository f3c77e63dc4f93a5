"""A model on a launched mesh: caches hold a rank's parts, and nothing runs without a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..errors import MeshError
from ..mesh import Mesh
from ..runtime.executable import Executable
from ..runtime.packing import Release
from ..tracing.constants import Constants
from .letting_go import LettingGo
from .source import Source

Type = tuple[tuple[int, ...], mx.Dtype]


class Ranks:
    """What is different where every rank makes the same calls.

    Programs are made when they are needed, in one order on all ranks.  They are not compared with
    the model, which no rank holds whole.

    Attributes:
        launched: is this process one rank of several?
        letting_go: the model's weights of which this rank has packed its part.
    """

    def __init__(self, mesh: Mesh | None, model: Any) -> None:
        self.launched = mesh is not None and mesh.size > 1 and not mesh.in_one_process
        self.letting_go = LettingGo(Source.of(model))
        self._wholes: dict[Type, Type] = {}

    def release(self, constants: Constants) -> Release:
        """What packing does with weights of which a rank needs no more."""
        if not self.launched:
            return False
        return lambda weight, in_parts: self.letting_go.let_go(weight, in_parts, constants)

    def whole(self, types: tuple[Any, ...]) -> tuple[Any, ...]:
        """Types of caches' arrays as the model has them, of which a rank may hold parts."""
        if not self._wholes:
            return types
        return tuple(tuple(self._wholes.get(t, t) for t in some) for some in types)

    def learn(self, executable: Executable) -> None:
        """Of which arrays a program holds parts, to know them by in a cache."""
        for part in executable.parts.values():
            self._wholes[part.type.shape, part.type.dtype] = part.whole.shape, part.whole.dtype

    def refuse(self, why: str, cache: Sequence[Any] | None) -> None:
        """Before the model runs a call itself.

        Raises:
            MeshError: its weights or its caches are in parts, so it cannot.
        """
        if self.letting_go or (self._wholes and cache is not None):
            raise MeshError(
                f"the model cannot run this call itself, as ranks hold parts of it: {why}",
                hint="run it on one device",
            )
