"""Plain English to fit on and to test on, and perplexity over it.

The texts are news: the background and the corpus of Lee et al. (2005), as gensim ships them among
its test data.  `pip install --no-deps gensim` is enough; it is not imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx


def texts() -> tuple[str, str]:
    """Text to fit on and text to test on."""
    found = importlib.util.find_spec("gensim")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the texts are gensim's: pip install --no-deps gensim")
    folder = Path(next(iter(found.submodule_search_locations))) / "test" / "test_data"
    background, corpus = (
        (folder / name).read_text("latin-1") for name in ("lee_background.cor", "lee.cor")
    )
    return background, corpus


def cut(tokenizer: Any, text: str, count: int, length: int) -> list[mx.array]:
    """`count` stretches of `length` tokens, [1, length] each."""
    ids = tokenizer.encode(text)[: count * length]
    return [mx.array([ids[i : i + length]]) for i in range(0, len(ids) - length + 1, length)]


def log_perplexity(model: Callable[[mx.array], mx.array], tests: Sequence[mx.array]) -> float:
    """The mean of minus the log-likelihood of each next token, in nats.

    Args:
        model: from ids, [1, length], to logits.
    """
    total, count = 0.0, 0
    for ids in tests:
        scores = model(ids)[0, :-1].astype(mx.float32)
        wanted = ids[0, 1:, None]
        likely = mx.take_along_axis(scores, wanted, axis=-1)[:, 0] - mx.logsumexp(scores, axis=-1)
        total -= float(likely.sum())
        count += likely.size
    return total / count
