"""Perplexity of SmolLM2-135M."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.examples import smollm2_files as files

from . import mlx_lm_methods as theirs
from .row import METHODS, Task
from .text import cut, log_perplexity, texts

FORMATS = [
    {"bits": bits, "group_size": size}
    for bits in (2, 3, 4, 5, 6, 8)
    for size in (32, 64, 128)
    if (bits, size) != (4, 32)
]
LENGTH = 256
"""Tokens of a stretch of text."""


class SmolLM2(Task):
    """See the module."""

    measure = "perplexity"
    bits = (3.5, 4.5, 2.5, 3.0, 4.0, 5.0, 5.5)
    others = tuple(theirs.METHODS)

    def __init__(self, tokens: int, tests: int = 16) -> None:
        found = files.load()
        self.model = files.mlx_lm_model(files.dequantized(found.weights), found.config)
        background, corpus = texts()
        self.data = cut(found.tokenizer, background, tokens // LENGTH, LENGTH)
        self.tests = cut(found.tokenizer, corpus, tests, LENGTH)
        self.kept: dict[Any, Any] = {}

    @cached_property
    def whole(self) -> float:
        """Of the float model, in nats."""
        return self.of(qg.compile(self.model, self.tests[0]))

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"SmolLM2-135M, float {math.exp(self.whole):.2f}"

    def of(self, model: Callable[[mx.array], mx.array]) -> float:
        return log_perplexity(model, self.tests)

    def row(self, bits: float, method: str) -> dict[str, Any] | None:
        budget = self.budget(bits)
        if method in METHODS:
            config = qg.Quantize.fit(
                self.model, self.data, bytes=budget, methods=METHODS[method], formats=FORMATS,
                result="logits", scales=mx.float16, where=qg.Quantize.as_mlx(self.model),
                folder=self.folder,
            )  # fmt: skip
            size = sum(one.nbytes for one in (config.fitted or {}).values())
            value = self.of(qg.compile(self.model, self.tests[0], quantize=config))
        else:
            ids = mx.concatenate(self.data)
            made = theirs.METHODS[method](self.model, ids, budget, self.kept)
            if made is None:
                return None
            size = theirs.size_of(made)
            value = self.of(qg.compile(theirs.half_scales(made), self.tests[0]))
        gap = value - self.whole
        return {"bytes": size, "value": round(math.exp(value), 3), "gap": round(gap, 5)}
