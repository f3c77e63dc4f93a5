"""The command line: `qgraph show`, `diff`, `dump`, `lint`, `profile`, `tune`, `demo`, `doctor`."""

from __future__ import annotations

from .commands import app, main

__all__ = ["app", "main"]
