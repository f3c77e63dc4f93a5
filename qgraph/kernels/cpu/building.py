"""Compiling the C++ here to one library, under a name that says what it was built from and for.

It needs nothing but the standard library, so that an installation (`setup.py`) can build it before
qgraph is there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

COMPILER = "g++"
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fno-math-errno",
    "-march=native",
    "-pthread",
    "-fPIC",
)

HERE = Path(__file__).parent
INSTALLED = HERE / "built"
"""Where an installation puts the library that it built."""

DIGEST = b"qgraph's digest:"
_LONGEST = ("few_rows.cpp", "few_rows_dense.cpp")
"""Compiled first, so that no core waits for them in the end."""

Texts = dict[str, bytes]


def sources() -> Texts:
    """The text of each file of C++, by name."""
    found = {f.name: f.read_bytes() for f in HERE.iterdir() if f.suffix in (".cpp", ".hpp", ".h")}
    return dict(sorted(found.items(), key=lambda entry: (entry[0] not in _LONGEST, entry[0])))


def name_of(texts: Texts, flags: Sequence[str]) -> str:
    """The file name of a library of these sources for this machine's processor."""
    key = hashlib.sha256(repr((texts, tuple(flags), _processor())).encode()).hexdigest()[:20]
    return f"kernels-{key}.so"


def compiled(
    texts: Texts, folder: Path, compiler: str, flags: Sequence[str], done: Callable[[], None]
) -> Path:
    """Compile the files in a folder, as many at a time as there are cores, and link them.

    Args:
        done: called after each file.

    Raises:
        OSError, subprocess.CalledProcessError: there is no such compiler, or it fails.
    """
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    names = [name for name in texts if name.endswith(".cpp")]

    def run(*arguments: str) -> None:
        command = [compiler, *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        jobs = [threads.submit(run, *flags, "-c", name, "-o", f"{name}.o") for name in names]
        for job in as_completed(jobs):
            job.result()
            done()
    run("-shared", "-pthread", *(f"{name}.o" for name in names), "-o", "kernels.so")
    return folder / "kernels.so"


def keep(made: Path, place: Path) -> None:
    """Put a library in its place at once, as others may build the same; it ends with a digest."""
    content = made.read_bytes()
    made.write_bytes(content + DIGEST + hashlib.sha256(content).digest())
    os.replace(made, place)


def is_whole(place: Path) -> bool:
    """Is a library there that nothing cut short or changed?"""
    try:
        content = place.read_bytes()
    except OSError:
        return False
    body, mark, digest = content.rpartition(DIGEST)
    return bool(mark) and hashlib.sha256(body).digest() == digest


def install(folder: Path) -> Path:
    """Build the library into a folder; its place.

    Raises:
        OSError, subprocess.CalledProcessError: it cannot be built.
    """
    texts = sources()
    place = folder / name_of(texts, FLAGS)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        keep(compiled(texts, Path(scratch), COMPILER, FLAGS, lambda: None), place)
    return place


@cache
def _processor() -> tuple[Any, ...]:
    """What `-march=native` means here: a home folder may be shared by several machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = re.findall(r"^(?:flags|Features|model name|CPU part)\s*:.*$", text, re.MULTILINE)
    return platform.machine(), *sorted(set(lines))
