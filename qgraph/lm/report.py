"""What an accelerated model says of itself."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any


class Report:
    """Notes of a model's calls: each reason is said once, and counted."""

    def __init__(self) -> None:
        self.never = ""
        self.eagerly: Counter[str] = Counter()
        self.notes: list[str] = []

    def eager(self, why: str) -> None:
        if why not in self.eagerly:
            warnings.warn(f"qgraph: runs eagerly: {why}", UserWarning, stacklevel=6)
        self.eagerly[why] += 1

    def note(self, words: str) -> None:
        self.notes.append(words)

    def text(self, programs: Iterable[Any], packed: Any) -> str:
        lines = []
        for program in programs:
            if program.executable is None:
                continue
            lines.append(f"program {program.executable.graph.name}")
        lines += [f"eagerly, {n} times: {why}" for why, n in self.eagerly.items()]
        return "\n".join([*lines, *self.notes])
