"""The default passes without some of them."""

from __future__ import annotations

from typing import Any

import qgraph as qg
from qgraph.target import as_target


def passes_without(*names: str, target: str = "cpu", **options: Any) -> list[qg.Pass]:
    """Tests of a kernel leave "form-regions" out: a region has no kernels, and a body no steps."""
    return [p for p in qg.default_passes(as_target(target), **options) if p.name not in names]
