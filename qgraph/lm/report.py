"""What an accelerated model says of itself."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

from ..runtime.packing import PackCache
from .programs import Program


class Report:
    """Notes of a model's calls: each reason is said once, and counted."""

    def __init__(self) -> None:
        self.eager: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def ran_eagerly(self, why: str) -> None:
        if why not in self.eager:
            warnings.warn(f"qgraph: the model runs itself: {why}", UserWarning, stacklevel=5)
        self.eager[why] += 1

    def note(self, words: str) -> None:
        self.notes[words] += 1

    def text(self, programs: Iterable[Program], packed: PackCache) -> str:
        lines = []
        for program in programs:
            if program.executable is not None:
                lines.append(
                    f"{program.form}: {program.calls} calls, made in {program.seconds:.1f} s"
                )
        lines += [f"by the model itself, {n} times: {why}" for why, n in self.eager.items()]
        lines += [f"{words} ({n} times)" for words, n in self.notes.items()]
        return "\n".join(lines)
