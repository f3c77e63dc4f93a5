"""What a fit has done so far, in a folder, so that it goes on where it was broken off."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..quantization.fitted import Fitted
from ..quantization.fitted_files import read_fitted, write_fitted
from .learned import Learned
from .rounding.formats import Format


@dataclass(frozen=True)
class Store:
    """A folder with what was learned, and a file for each weight that is done.

    Attributes:
        folder: None keeps nothing.
    """

    folder: Path | None

    @staticmethod
    def of(folder: Any) -> Store:
        return Store(None if folder is None else Path(folder))

    def learned(self, mark: str) -> Learned | None:
        """What a fit of this mark learned before."""
        return None if self.folder is None else Learned.read(self._learned(mark))

    def keep(self, learned: Learned, mark: str) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            learned.write(self._learned(mark))

    def _learned(self, mark: str) -> Path:
        assert self.folder is not None
        return self.folder / f"learned-{mark}.npz"

    def read(self, name: str, form: Format, mark: str, fit: str) -> Fitted | None:
        """The weight, if this very fit made it before.

        Args:
            mark: of the weight's numbers.
            fit: a mark of all that the numbers found for it depend on.
        """
        path = self._weight(name)
        if path is None or not path.exists():
            return None
        fitted, said, _ = read_fitted(path)
        found = fitted.get(name)
        if found is None or said.get("fit") != fit:
            return None
        return found if found.settings == form.settings and found.mark == mark else None

    def write(self, name: str, fitted: Fitted, fit: str) -> None:
        path = self._weight(name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_fitted(path, {name: fitted}, {"fit": fit})

    def _weight(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        mark = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        return self.folder / f"{mark}.safetensors"
