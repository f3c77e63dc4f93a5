"""Where MLX looks for compiled kernels, as mlx 0.32 has it in `jit_module.cpp`.

The code is one file, the names of its kernels another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

from .nvrtc import Code
from .text import Module

LONGEST = 245
"""Characters of a file's name; what is longer becomes folders."""


def folder() -> Path:
    """MLX asks for it once, when it needs it first."""
    own = os.environ.get("MLX_PTX_CACHE_DIR")
    return Path(own) if own else Path(tempfile.gettempdir(), "mlx", version("mlx"), "ptx")


def place(name: str) -> Path:
    """Of the code of a module.

    >>> place("m" * 300).relative_to(folder()).parts == ("m" * 245, "m" * 55 + ".ptx")
    True
    """
    parts = [name[i : i + LONGEST] for i in range(0, len(name), LONGEST)]
    return folder().joinpath(*parts[:-1], f"{parts[-1]}.ptx")


def included(text: str) -> str:
    """A line that includes a text; the text itself where it cannot be written.

    MLX hashes what a kernel is made of at every launch, some 2 µs for the 8 KB of a region.
    """
    path = folder() / "texts" / f"{hashlib.sha1(text.encode()).hexdigest()}.cuh"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, text.encode())
    except OSError:
        return text
    return f'#include "{path}"\n'


def is_kept(module: Module) -> bool:
    return place(module.name).is_file()


def keep(module: Module, made: Code) -> None:
    """For this process and all later ones; where that cannot be written nothing happens."""
    code = place(module.name)
    with contextlib.suppress(OSError):
        code.parent.mkdir(parents=True, exist_ok=True)
        _write(code.with_suffix(".txt"), f"{module.entry}\t{made.entry}\n".encode())
        _write(code, made.code)  # last: MLX reads both once this one is there


def _write(path: Path, content: bytes) -> None:
    """All at once: another process may be reading."""
    scratch = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    scratch.write_bytes(content)
    scratch.replace(path)
