"""Fitted weights in a file of safetensors: arrays by name and part, and JSON for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from .fitted import Fitted

_SAID = ("bits", "group_size", "mode", "mark", "method", "error", "sensitivity", "prices")


def write_fitted(path: Path, fitted: Mapping[str, Fitted], said: Mapping[str, Any]) -> None:
    """Write weights, and what else is to be said; a file that is there is replaced whole."""
    arrays = {
        f"{name}|{part}": array
        for name, one in fitted.items()
        for part in ("weight", "scales", "biases")
        if (array := getattr(one, part)) is not None
    }
    weights = {name: {key: getattr(one, key) for key in _SAID} for name, one in fitted.items()}
    about = json.dumps({"weights": weights, "said": dict(said)})
    temporary = path.with_suffix(".part.safetensors")
    mx.save_safetensors(str(temporary), arrays or {"none": mx.zeros(1)}, {"qgraph": about})
    temporary.replace(path)


def read_fitted(path: Path) -> tuple[dict[str, Fitted], dict[str, Any]]:
    """What `write_fitted` wrote."""
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
    return fitted, about["said"]
