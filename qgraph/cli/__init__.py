"""The command line: `qgraph show`, `diff`, `dump`, `lint`, `profile`, `tune`, `demo`, `doctor`,
and for models of mlx-lm `generate`, `chat`, `serve`."""

from __future__ import annotations

from . import generation  # adds its commands
from .commands import app, main

__all__ = ["app", "generation", "main"]
