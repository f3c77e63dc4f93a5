"""MiniLM: how near the similarities of sentences are to those of the float model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg
from qgraph.examples import minilm

from .row import METHODS, Task
from .text import texts

BATCH, LENGTH = 16, 32
"""Sentences at a time, and tokens of each."""


class MiniLM(Task):
    """`value` is the correlation of similarities with the float model's, `gap` the root of their
    mean squared difference."""

    measure = "correlation"
    title = "all-MiniLM-L6-v2, float 1"
    bits = (3.5, 4.5, 5.5)

    def __init__(self, tokens: int, tests: int = 8) -> None:
        self.model, tokenizer = minilm.load()
        tokenizer.enable_truncation(LENGTH)
        tokenizer.enable_padding(length=LENGTH)
        self.tokenizer = tokenizer
        background, corpus = texts()
        self.data = self._batches(background, tokens // (BATCH * LENGTH))
        self.tests = self._batches(corpus, tests)

    def _batches(self, text: str, count: int) -> list[tuple[mx.array, mx.array]]:
        """Sentences of at least six words, BATCH at a time."""
        sentences = [s for s in text.replace("\n", " ").split(". ") if s.count(" ") > 4]
        pieces = [sentences[i * BATCH : (i + 1) * BATCH] for i in range(count)]
        return [minilm.batch(self.tokenizer, piece) for piece in pieces if len(piece) == BATCH]

    def similarities(self, model: Any) -> np.ndarray[Any, Any]:
        """Of all pairs of test sentences."""
        vectors = np.concatenate([np.array(model(*batch)) for batch in self.tests])
        similar: np.ndarray[Any, Any] = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
        return similar

    @cached_property
    def whole(self) -> np.ndarray[Any, Any]:
        return self.similarities(qg.compile(self.model, *self.tests[0]))

    def row(self, bits: float, method: str) -> dict[str, Any] | None:
        graph = qg.from_mlx(self.model, *self.tests[0])
        methods: Sequence[str] = METHODS[method]
        budget = self.budget(bits)
        config = qg.Quantize.fit(
            graph, self.data, bytes=budget, methods=methods, scales=mx.float16,
            where=qg.Quantize.as_mlx(self.model), folder=self.folder,
        )  # fmt: skip
        found = self.similarities(qg.compile(graph, quantize=config))
        gap = float(np.sqrt(np.mean((found - self.whole) ** 2)))
        size = sum(one.nbytes for one in (config.fitted or {}).values())
        agreement = float(np.corrcoef(found, self.whole)[0, 1])
        return {"bytes": size, "value": round(agreement, 5), "gap": round(gap, 5)}
