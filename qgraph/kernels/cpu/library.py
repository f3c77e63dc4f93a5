"""The library of CPU kernels: built by the machine's own compiler, kept and loaded.

MLX on Linux builds its fused CPU kernels with `g++` too, so this asks for nothing new.  One library
holds every kernel and serves every model.  An installation builds it along (`setup.py`); where it
did not, or for another processor, it is built when it is first needed and stays in the cache
folder of the user, under a name made of sources, flags and instructions.  It ends with a
digest of itself: one that was cut short is built again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import platformdirs

from ..progress import progress
from .building import COMPILER, FLAGS, INSTALLED, Texts, compiled, is_whole, keep, name_of, sources


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


def _built() -> Path:
    texts = sources()
    name = name_of(texts, FLAGS)
    if is_whole(INSTALLED / name):
        return INSTALLED / name
    place = _folder() / name
    if not is_whole(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            keep(_compiled(texts, Path(scratch)), place)
    return place


def _compiled(texts: Texts, folder: Path) -> Path:
    count = sum(name.endswith(".cpp") for name in texts)
    what = "building its CPU kernels, once for this machine"
    with progress(what, count, patience=0) as done:
        return compiled(texts, folder, COMPILER, FLAGS, done)


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
