"""What a fit learns from the float weights before it fits any, kept in a file.

A fit that was broken off does not learn it again, nor does one with another budget.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .statistics.gathered import Array, Key, Seen
from .statistics.moments import Moments


@dataclass(frozen=True)
class Learned:
    """What errors cost, inputs of weights that are fitted before others, prices and factors.

    Attributes:
        costs: of each format of each weight.
        factors: by the weight that is divided; None where all ones are best.
    """

    seen: dict[Key, Seen]
    moments: dict[Key, Moments]
    costs: dict[str, list[float]]
    factors: dict[str, Array | None]

    def write(self, path: Path) -> None:
        """To one file of NumPy's: arrays by number, and JSON that says which is which."""
        arrays: list[Array] = []

        def put(array: Any) -> int:
            arrays.append(np.asarray(array))
            return len(arrays) - 1

        about = {
            "seen": [
                [key, s.count, s.looked, put(s.outputs), put(s.columns),
                 [[where, put(tokens)] for where, tokens in s.tokens.items()]]
                for key, s in self.seen.items()
            ],
            "moments": [[key, m.rows, put(m.sum)] for key, m in self.moments.items()],
            "costs": self.costs,
            "factors": {n: None if f is None else put(f) for n, f in self.factors.items()},
        }  # fmt: skip
        temporary = path.with_suffix(".part.npz")
        named: dict[str, Any] = {str(i): array for i, array in enumerate(arrays)}
        np.savez(temporary, about=json.dumps(about), **named)
        temporary.replace(path)

    @staticmethod
    def read(path: Path) -> Learned | None:
        """What `write` wrote; None if there is no such file."""
        if not path.exists():
            return None
        with np.load(path) as arrays:
            about = json.loads(str(arrays["about"]))

            def get(number: int) -> Array:
                array: Array = arrays[str(number)]
                return array

            seen = {
                _key(key): Seen(
                    get(outputs), get(columns), count, looked,
                    {tuple(where): get(each) for where, each in tokens},
                )
                for key, count, looked, outputs, columns, tokens in about["seen"]
            }  # fmt: skip
            moments = {
                _key(key): Moments.of(get(total), rows) for key, rows, total in about["moments"]
            }
            factors = {n: None if f is None else get(f) for n, f in about["factors"].items()}
        return Learned(seen, moments, about["costs"], factors)


def _key(said: Sequence[Any]) -> Key:
    name, index = said
    return name, tuple(index)


def digest(batches: Iterable[Sequence[mx.array]], *said: Any) -> str:
    """A mark of data and of whatever else a fit depends on, as it prints."""
    found = hashlib.blake2b(repr(said).encode(), digest_size=8)
    for batch in batches:
        for array in batch:
            found.update(repr((array.shape, array.dtype)).encode())
            found.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return found.hexdigest()
