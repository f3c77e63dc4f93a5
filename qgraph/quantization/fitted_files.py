"""Fitted weights in a file of safetensors: arrays by name and part, and JSON for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from .fitted import Fitted

_SAID = ("bits", "group_size", "mode", "mark", "method", "error", "sensitivity", "prices")


def write_fitted(
    path: Path,
    fitted: Mapping[str, Fitted],
    said: Mapping[str, Any],
    folded: Mapping[str, mx.array] | None = None,
) -> None:
    """Write weights, factors of channels, and what else is to be said.

    A file that is there is replaced whole.
    """
    arrays = {
        f"{name}|{part}": array
        for name, one in fitted.items()
        for part in ("weight", "scales", "biases")
        if (array := getattr(one, part)) is not None
    }
    arrays |= {f"{name}|factors": array for name, array in (folded or {}).items()}
    weights = {name: {key: getattr(one, key) for key in _SAID} for name, one in fitted.items()}
    about = json.dumps({"weights": weights, "folded": list(folded or {}), "said": dict(said)})
    temporary = path.with_suffix(".part.safetensors")
    mx.save_safetensors(str(temporary), arrays or {"none": mx.zeros(1)}, {"qgraph": about})
    temporary.replace(path)


def read_fitted(path: Path) -> tuple[dict[str, Fitted], dict[str, Any], dict[str, mx.array]]:
    """What `write_fitted` wrote: weights, what is said of them, and factors."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    arrays, metadata = loaded
    about = json.loads(metadata["qgraph"])
    fitted = {
        name: Fitted(
            **{part: arrays.get(f"{name}|{part}") for part in ("weight", "scales", "biases")},
            **values,
        )
        for name, values in about["weights"].items()
    }
    folded = {name: arrays[f"{name}|factors"] for name in about.get("folded", ())}
    return fitted, about["said"], folded
