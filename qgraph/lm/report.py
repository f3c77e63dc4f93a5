"""What an accelerated model says of itself."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

from ..runtime.packing import PackCache, whole
from .programs.maker import Program

MIB = 2**20


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
        made = [program for program in programs if program.executable is not None]
        lines = [
            f"{len(made)} programs, {packed_bytes(made, packed) / MIB:.1f} MiB packed for them"
        ]
        for program in made:
            how = "read" if program.kept else "made"
            line = f"  {program.form}: {program.calls} calls, {how} in {program.seconds:.1f} s"
            lines.append(line + ("" if program.checked else ", not compared with the model yet"))
        lines += [f"by the model itself, {n} times: {why}" for why, n in self.eager.items()]
        lines += [f"{words} ({n} times)" for words, n in self.notes.items()]
        for program in made[-1:]:
            lines += [f"refused, {n} times: {why}" for why, n in refusals(program).items()]
        return "\n".join(lines)


def refusals(program: Program) -> Counter[str]:
    """What passes and lowering left alone in a program, and how often for which reason."""
    refused = [entry for entry in program.ledger() if entry.decision == "refused"]
    return Counter(f"{entry.what}: {entry.reason}" for entry in refused)


def packed_bytes(programs: Sequence[Program], packed: PackCache) -> int:
    """Bytes that programs keep beside the model's own weights."""
    found = {}
    for program in programs:
        assert program.executable is not None
        keys = packed.keys(program.executable.graph)
        for value in program.executable.known:
            held = whole(value)
            if held.node.op != "constant":
                found[keys[held.node], held.index] = held.type.nbytes
    return sum(found.values())
