"""The first use of a program: does the model itself give the same?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ...target import Target
from ..caches.kind import Kind
from .compare import Difference, Result, a_little_apart, compared, in_float32

EDGE = 4
"""Tokens at the beginning of a piece that stand for all of it."""


@dataclass(frozen=True)
class Check:
    """Compares a program's results with what the model gives from a copy of the caches.

    On CPUs the model takes seconds for what a program does in a tenth: of a long piece it is given
    the first tokens, whose keys and values those behind them do not change, and the last one, over
    the caches of the program.

    Args:
        own: the call of the model's class.
        target: of the programs.
    """

    own: Callable[..., Any]
    target: Target

    def difference(
        self, model: Any, kinds: Sequence[Kind], tokens: mx.array, before: Any, mine: Result
    ) -> Difference | None:
        """Where they part, if they do; `before` stays as it is."""
        count = tokens.shape[1]
        pairs = list(zip(kinds, before, strict=True))
        whole = count <= 2 * EDGE or not self.target.is_cpu
        if whole or not all(kind.can_go_back(c, count) for kind, c in pairs):
            return self._compared(model, kinds, tokens, before, mine)
        caches = mine[1]
        first = self._compared(model, kinds, tokens[:, :EDGE], before, (None, caches))
        if first is not None:
            return first
        last = copy.deepcopy(caches)
        for cache in last:
            cache.trim(1)
        return self._compared(model, kinds, tokens[:, -1:], last, mine)

    def _compared(
        self, model: Any, kinds: Sequence[Kind], tokens: mx.array, before: Any, mine: Result
    ) -> Difference | None:
        after = copy.deepcopy(before)
        logits = self.own(model, tokens, cache=after)

        def of_these(logits: mx.array | None, caches: Sequence[Any]) -> Result:
            return (None if mine[0] is None else logits), caches

        def exactly() -> Result:
            return of_these(*in_float32(model, tokens, before, self.own))

        def nearly() -> Result:
            return of_these(*a_little_apart(model, tokens, before, self.own))

        return compared(kinds, mine, of_these(logits, after), exactly, nearly)
