"""The command line: `qgraph show`, `diff`, `dump`, `lint`, `profile`, `tune`, `demo`, `doctor`,
and for models of mlx-lm `generate`, `chat`, `serve`, `quantize`."""

from __future__ import annotations

from . import generation, quantize  # they add their commands
from .commands import app, main

__all__ = ["app", "generation", "main", "quantize"]
