"""An artefact with every byte and every field of its JSON damaged in turn.

    python -m tests.fuzz.damage [loops layers search small] [--every 10] [--limit 20]

No damage may crash or hang the process, give a wrong answer, or raise an error that is not
documented.  Cases run in a process of their own; one that ends it, or takes longer than the limit,
is a finding, and the next process goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qgraph.runtime.artefact import ABOUT, GRAPH, WEIGHTS
from tests.fuzz.artefacts import PROGRAMS, Files, outcome, saved

VALUES: list[Any] = [
    *(0, 1, -1, 2, 2**31, 2**63, 1.5, float("nan"), "", "x", "add", "f32[2]", None, True, False),
    *([], {}, [0], {"$value": [0, 0]}, {"$tuple": []}, {"$dtype": "f16"}, {"$slice": [0, 1, 0]}),
]
"""What a field may hold instead."""
DATA = 64
"""So many of the bytes of the arrays' data are damaged."""

Case = tuple[str, Files, bool]


def cases(name: str) -> Iterator[Case]:
    """Every damage of an artefact, with words for it, and whether it is signed anew."""
    files = saved(name)
    yield from _bytes(files, ABOUT, range(len(files[ABOUT])), sign=False)
    yield from _bytes(files, GRAPH, range(len(files[GRAPH])), sign=True)
    header = 8 + int.from_bytes(files[WEIGHTS][:8], "little")
    yield from _bytes(files, WEIGHTS, range(header), sign=True)
    length = len(files[WEIGHTS])
    places = range(header, length, max(1, (length - header) // DATA))
    yield from _bytes(files, WEIGHTS, places, sign=True)
    for file in (GRAPH, WEIGHTS):
        yield from _bytes(files, file, range(0, len(files[file]), 97), sign=False)
        for end in range(0, len(files[file]), max(1, len(files[file]) // 50)):
            yield f"{file} cut at {end}", {**files, file: files[file][:end]}, end % 2 == 0
    for file in (ABOUT, GRAPH):
        yield from _fields(files, file)


def _bytes(files: Files, file: str, places: range, *, sign: bool) -> Iterator[Case]:
    for place in places:
        content = bytearray(files[file])
        content[place] ^= 1 << place % 8
        yield f"{file} byte {place}", {**files, file: bytes(content)}, sign
        digit = ord("0") + place % 10
        if file != WEIGHTS and content[place] != digit:
            content[place] = digit
            yield f"{file} byte {place} a digit", {**files, file: bytes(content)}, sign


def _fields(files: Files, file: str) -> Iterator[Case]:
    data = json.loads(files[file])
    for way in _ways(data):
        for value in (*VALUES, ...):
            changed = json.loads(files[file])
            inner = changed
            for step in way[:-1]:
                inner = inner[step]
            if value is ...:
                del inner[way[-1]]
            else:
                inner[way[-1]] = value
            words = f"{file} {'.'.join(map(str, way))}: {'gone' if value is ... else value!r}"
            yield words, {**files, file: json.dumps(changed).encode()}, file != ABOUT


def _ways(data: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield (*way, key)
            yield from _ways(data[key], (*way, key))


def work(name: str, start: int, every: int) -> None:
    """Run every n-th case from `start`, a line for each: before it, and what came of it."""
    for number, (words, files, sign) in enumerate(cases(name)):
        if number < start or number % every:
            continue
        print(json.dumps([number, words, None]), flush=True)
        try:
            found = outcome(name, files, sign=sign)
        except Exception:
            found = "! " + traceback.format_exc(limit=-3)
        print(json.dumps([number, words, found]), flush=True)


ENOUGH = 150
"""Cases that are run however long they take."""


def run(
    name: str, every: int = 1, limit: float = 20, seconds: float = float("inf")
) -> tuple[Counter[str], dict[str, str]]:
    """Outcomes by kind, and what is wrong by damage; after so many seconds it is `ENOUGH`."""
    end = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    findings: dict[str, str] = {}
    start: int | None = 0
    while start is not None:
        start = _process(name, start, every, limit, end, counts, findings)
    return counts, findings


def _process(
    name: str,
    start: int,
    every: int,
    limit: float,
    end: float,
    counts: Counter[str],
    findings: dict[str, str],
) -> int | None:
    """Run cases until there are no more, or it is time to end, or one ends the process: then the
    next one's number."""
    command = [sys.executable, "-m", "tests.fuzz.damage", name, "--work", str(start)]
    process = subprocess.Popen(
        [*command, "--every", str(every)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    pending, open_case, wait = b"", None, 60 + limit  # the imports first
    with process:
        while select.select([process.stdout], [], [], wait)[0]:
            wait = limit
            piece = os.read(process.stdout.fileno(), 1 << 16)
            *lines, pending = (pending + piece).split(b"\n")
            for line in lines:
                number, words, found = json.loads(line)
                open_case = None if found is not None else (number, words)
                if found is not None:
                    counts["wrong" if found.startswith("! ") else found] += 1
                    if found.startswith("! "):
                        findings[words] = found
            if not piece:
                break
            if time.monotonic() > end and counts.total() >= ENOUGH:
                process.kill()
                return None
        else:
            process.kill()
        status = process.wait()
        if open_case is None:
            assert status == 0, process.stderr.read().decode()[-2000:]
            return None
        counts["wrong"] += 1
        findings[open_case[1]] = f"the process hung, or ended: {status}"
        return open_case[0] + 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.damage", description=__doc__)
    parser.add_argument("programs", nargs="*", default=[*PROGRAMS])
    parser.add_argument("--every", type=int, default=1, help="only each n-th damage")
    parser.add_argument("--limit", type=float, default=20, help="seconds that a case may take")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        work(args.programs[0], args.work, args.every)
        return 0
    wrong = 0
    for name in args.programs:
        start = time.monotonic()
        counts, findings = run(name, args.every, args.limit)
        wrong += len(findings)
        for words, found in findings.items():
            print(f"{name}: {words}\n  {found}\n", flush=True)
        seconds = time.monotonic() - start
        print(f"{name}: {counts.total()} damages in {seconds:.0f} s, {dict(counts)}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
