"""What was measured on this machine, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import platformdirs

from ...version import __version__
from ..base import Problem
from .cost import problem_key

FORMAT = 2
"""Changes when a file written before can no longer be read; 2 has a digest."""


def device_key(problem: Problem) -> str:
    """What measurements are valid for: processor or GPU, cores, and whose kernels were measured."""
    more = ""
    if problem.backend == "cpu":
        name = mx.device_info(mx.Device(mx.cpu, 0)).get("device_name", "")
        more = f" {name}, {problem.cores} cores"
    return f"{problem.backend} {problem.arch}{more}, {_versions(problem.backend)}"


@cache
def _versions(backend: str) -> str:
    numpy = f", numpy {np.__version__}" if backend == "cpu" else ""
    return f"mlx {version('mlx')}{numpy}, qgraph {__version__}"


class Cache:
    """Measured microseconds by device, problem and kernel, in one JSON file.

    It carries a digest of what it holds.  A file that cannot be read, or was damaged, is ignored
    with a warning and replaced at the next `put`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._devices = self._read()

    @staticmethod
    def user() -> Cache:
        """The cache in the user's cache folder."""
        return Cache(Path(platformdirs.user_cache_dir("qgraph")) / "kernels.json")

    def get(self, problem: Problem) -> dict[str, float]:
        """Microseconds by kernel, empty if the problem was never measured here."""
        entry = self._devices.get(device_key(problem), {}).get(problem_key(problem), {})
        return {name: us for name, us in entry.items() if _is_time(us)}

    def put(self, problem: Problem, found: Mapping[str, float]) -> None:
        """Remember measurements; others' in the file since it was read are kept."""
        self._devices = self._read()
        problems = self._devices.setdefault(device_key(problem), {})
        problems.setdefault(problem_key(problem), {}).update(found)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, suffix=".json", delete=False
            ) as file:
                whole = {"format": FORMAT, "sha256": _digest(self._devices)}
                json.dump(whole | {"devices": self._devices}, file, indent=1)
            os.replace(file.name, self.path)
        except OSError as error:
            warnings.warn(f"measurements were not saved: {error}", stacklevel=3)

    def _read(self) -> dict[str, dict[str, dict[str, Any]]]:
        try:
            data = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, RecursionError, ValueError) as error:
            return self._ignored(f"cannot be read ({error})")
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            return self._ignored(f"is not of format {FORMAT}")
        devices = data.get("devices")
        if not isinstance(devices, dict) or not all(map(_is_device, devices.values())):
            return self._ignored("does not hold measurements")
        if data.get("sha256") != _digest(devices):
            return self._ignored("is not as it was written")
        return devices

    def _ignored(self, why: str) -> dict[str, Any]:
        warnings.warn(f"the cache {self.path} {why}; it is ignored", stacklevel=4)
        return {}


def _digest(devices: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(devices, sort_keys=True).encode()).hexdigest()


def _is_device(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(row, dict) for row in entry.values())


def _is_time(us: Any) -> bool:
    return type(us) in (int, float) and 0 < us < math.inf
