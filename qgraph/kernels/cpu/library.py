"""The C++ here, built by the machine's own compiler when it is first needed.

MLX on Linux builds its fused CPU kernels with `g++` too, so this asks for nothing new.  One library
holds every kernel and serves every model.  It stays in the user's cache folder, under a name made
of the sources, the flags and the processor's instructions, and ends with a digest of itself: one
that was cut short is built again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import platformdirs

from ..progress import progress

COMPILER = "g++"
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fno-math-errno",
    "-march=native",
    "-pthread",
    "-fPIC",
)

_DIGEST = b"qgraph's digest:"
_LONGEST = ("few_rows.cpp", "few_rows_dense.cpp")
"""Compiled first, so that no core waits for them in the end."""


@cache
def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if sys.platform != "linux":
        return "it is built with g++, on Linux"
    if shutil.which(COMPILER) is None:
        return "g++ is not installed"
    return None


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None, with a warning, if they cannot be built."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error) or type(error).__name__).splitlines()
        why = next((line for line in lines if "error" in line), lines[0])
        warnings.warn(
            f"the CPU kernels could not be built ({why}); slower ones stand in for them",
            stacklevel=3,
        )
        return None


def sources() -> dict[str, bytes]:
    """The text of each file of C++, by name."""
    files = resources.files("qgraph.kernels.cpu").iterdir()
    found = {f.name: f.read_bytes() for f in files if f.name.endswith((".cpp", ".hpp", ".h"))}
    return dict(sorted(found.items(), key=lambda entry: (entry[0] not in _LONGEST, entry[0])))


def _built() -> Path:
    texts = sources()
    key = hashlib.sha256(repr((texts, FLAGS, _processor())).encode()).hexdigest()[:20]
    place = _folder() / f"kernels-{key}.so"
    if not _whole(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            made = _compiled(texts, Path(scratch))
            content = made.read_bytes()
            made.write_bytes(content + _DIGEST + hashlib.sha256(content).digest())
            os.replace(made, place)  # at once, as another process may be building the same
    return place


def _whole(place: Path) -> bool:
    try:
        content = place.read_bytes()
    except OSError:
        return False
    body, mark, digest = content.rpartition(_DIGEST)
    return bool(mark) and hashlib.sha256(body).digest() == digest


def _compiled(texts: dict[str, bytes], folder: Path) -> Path:
    """Compile the files, as many at a time as there are cores, and link them."""
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    names = [name for name in texts if name.endswith(".cpp")]

    def run(*arguments: str) -> None:
        command = [COMPILER, *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)

    with (
        progress("building its CPU kernels, once for this machine", len(names), patience=0) as done,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
    ):
        jobs = [threads.submit(run, *FLAGS, "-c", name, "-o", f"{name}.o") for name in names]
        for job in as_completed(jobs):
            job.result()
            done()
    run("-shared", "-pthread", *(f"{name}.o" for name in names), "-o", "kernels.so")
    return folder / "kernels.so"


@cache
def _folder() -> Path:
    """Where libraries are kept: the user's cache, or else a folder of this process."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        kept = Path(platformdirs.user_cache_dir("qgraph")) / "cpu"
        kept.mkdir(parents=True, exist_ok=True)
        if os.access(kept, os.W_OK):
            return kept
    scratch = tempfile.mkdtemp(prefix="qgraph-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return Path(scratch)


@cache
def _processor() -> tuple[Any, ...]:
    """What `-march=native` means here: a home folder may be shared by several machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = re.findall(r"^(?:flags|Features|model name|CPU part)\s*:.*$", text, re.MULTILINE)
    return platform.machine(), *sorted(set(lines))
