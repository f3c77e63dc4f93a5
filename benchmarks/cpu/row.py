"""What a line of the table is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        runs: what is timed, by who does it; "qgraph" is one of them.
        floor: seconds that the machine's rates allow, or None.
        error: of the result, relative, where it is another than in float32; None elsewhere.
        unit: how many of a thing a run makes, such as tokens.
    """

    name: str
    runs: dict[str, Run]
    floor: float | None = None
    unit: int = 1
    error: float | None = None


@dataclass(frozen=True)
class Rates:
    """Bytes a second of a copy and float32 operations a second of a product."""

    copy: float
    flops: float


def evaluated(function: Callable[..., Any], *args: Any) -> Run:
    return lambda: mx.eval(function(*args))
