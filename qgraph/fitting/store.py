"""What a fit has done so far, in a folder, so that it goes on where it was broken off."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..quantization.fitted import Fitted
from ..quantization.fitted_files import read_fitted, write_fitted
from .formats import Format


@dataclass(frozen=True)
class Store:
    """A folder with one file for each weight that is done; None keeps nothing."""

    folder: Path | None

    @staticmethod
    def of(folder: Any) -> Store:
        return Store(None if folder is None else Path(folder))

    def _path(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        return (
            self.folder / f"{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}.safetensors"
        )

    def read(self, name: str, form: Format, mark: str, methods: tuple[str, ...]) -> Fitted | None:
        """The weight, if it was fitted before from the same numbers in the same way."""
        path = self._path(name)
        if path is None or not path.exists():
            return None
        fitted, said, _ = read_fitted(path)
        found = fitted.get(name)
        if found is None or said.get("methods") != list(methods):
            return None
        return found if found.settings == form.settings and found.mark == mark else None

    def write(self, name: str, fitted: Fitted, methods: tuple[str, ...]) -> None:
        path = self._path(name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_fitted(path, {name: fitted}, {"methods": list(methods)})
