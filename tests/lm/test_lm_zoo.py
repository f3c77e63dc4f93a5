"""Architectures of mlx-lm through programs: prompts in pieces, then token by token, as mlx-lm does.

By default every eighth of them, another eighth each day; QGRAPH_ZOO=all takes all that are listed,
QGRAPH_ZOO=3 the third eighth.
"""

from __future__ import annotations

import datetime
import inspect
import os
import statistics
import warnings
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn

import qgraph as qg
from tests.support import zoo

pytest.importorskip("mlx_lm.models.cache")

NOT_HERE = {"bitnet": "Metal", "muse_spark": "Metal"}
"""What mlx-lm itself cannot run without a Metal GPU."""
EAGER = {
    "dbrx": "evaluates an array",  # .tolist() on the experts that the router chose
    "deepseek_v41": "a cache of its own kind",  # whose shapes depend on the position
}
"""What runs without a program, and the words that say why."""
NAMES = sorted({*zoo.architectures()} - {*NOT_HERE, *EAGER})
ASKED = os.environ.get("QGRAPH_ZOO") or str(datetime.date.today().toordinal())
CHOSEN = NAMES if ASKED == "all" else NAMES[int(ASKED) % 8 :: 8]
PROMPTS = [mx.arange(5)[None] * 7 % 100, (mx.arange(14)[None] * 3 + 5) % 100]
BY_ITSELF = {"phi3small": "places blocks by the lengths of a call"}
"""Models that read prompts of several tokens themselves, and why."""
BATCHES = (
    "rows of several lengths, longer than a window, at once",
    "rows of several lengths, read into a state at once",
)
"""What of a batch's prompts models read themselves."""
ONE_BY_ONE = {"olmo"}
"""Models of which mlx-lm takes a token at a time: the mask of more is a word that they then add."""
STEPS = [mx.array([[(7 * i + 3) % 60]]) for i in range(12)]
"""Of few enough tokens for olmo, whose table has 64 rows here."""


@pytest.fixture(autouse=True)
def _without_fusing() -> Iterator[None]:
    """A compiler for each fused kernel of each architecture would take most of the time."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def logits(model: Any, prompts: list[mx.array]) -> mx.array:
    """The last token's after each call, with mlx-lm's own caches."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    found = [model(tokens, cache=cache)[:, -1] for tokens in (*prompts, *STEPS)]
    mx.eval(found)
    return mx.stack(found)


def prompts_of(name: str) -> list[mx.array]:
    return [mx.array([[t]]) for t in (3, 5, 9)] if name in ONE_BY_ONE else PROMPTS


def largest_difference(actual: mx.array, expected: mx.array) -> float:
    """Relative to the largest logit; those of -inf are of tokens that phi3small never gives."""
    forbidden = expected == -float("inf")
    assert mx.array_equal(actual == -float("inf"), forbidden).item()
    a, b = (mx.where(forbidden, 0, x).astype(mx.float32) for x in (actual, expected))
    scale = mx.abs(b).max().item()
    assert scale > 0  # logits of zero would prove nothing
    return mx.abs(a - b).max().item() / scale


def quantized(model: Any) -> Any:
    def fits(path: str, module: Any) -> bool:
        packs = getattr(module, "to_quantized", None)
        if packs is None or "mode" not in inspect.signature(packs).parameters:
            return False
        return "weight" in module and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=4, class_predicate=fits)
    return model


def accelerated(model: Any) -> Any:
    return qg.lm.accelerate(model, target="cpu", background=False, keep=False)


def by_mlx_lm(model: Any, name: str) -> mx.array:
    try:
        found = logits(model, prompts_of(name))
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"mlx-lm itself cannot: {error}")
    if mx.any(mx.isnan(found)).item():
        pytest.skip("mlx-lm itself gives no numbers")
    return found


def all_by_programs(name: str, fast: Any) -> None:
    assert fast.qgraph.programs
    allowed = (BY_ITSELF.get(name), *BATCHES)
    assert [why for why in fast.qgraph.eager if why not in allowed] == []


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4bit"])
@pytest.mark.parametrize("name", CHOSEN)
def test_float32(name: str, bits: int | None) -> None:
    model = zoo.build(name) if bits is None else quantized(zoo.build(name))
    expected = by_mlx_lm(model, name)
    fast = accelerated(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in BY_ITSELF else "error")
        actual = logits(fast, prompts_of(name))
    assert largest_difference(actual, expected) < 1e-4
    all_by_programs(name, fast)


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4bit"])
@pytest.mark.parametrize("name", CHOSEN)
def test_bfloat16(name: str, bits: int | None) -> None:
    """No farther from what the same weights give in float32 than mlx-lm's own bfloat16 is."""
    model = zoo.build(name) if bits is None else quantized(zoo.build(name))
    model.set_dtype(mx.bfloat16)
    theirs = by_mlx_lm(model, name)
    fast = accelerated(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in BY_ITSELF else "error")
        ours = logits(fast, prompts_of(name))
    all_by_programs(name, fast)
    model.set_dtype(mx.float32)
    exact = logits(model, prompts_of(name))
    # A router or an indexer chooses otherwise now and then, where rounding decides.
    far = [
        statistics.median(largest_difference(a, b) for a, b in zip(x, exact, strict=True))
        for x in (ours, theirs)
    ]
    assert far[0] < 1.5 * far[1] + 0.01


@pytest.mark.parametrize("name", EAGER)
def test_what_runs_eagerly_says_why(name: str) -> None:
    model = zoo.build(name)
    fast = accelerated(model)
    with pytest.warns(UserWarning, match=EAGER[name]):
        actual = logits(fast, PROMPTS)
    assert mx.array_equal(actual, logits(model, PROMPTS)).item()
    assert any(EAGER[name] in why for why in fast.qgraph.eager)
    assert EAGER[name] in fast.qgraph.report()


@pytest.mark.parametrize("name", [name for name in CHOSEN if name not in ONE_BY_ONE])
def test_a_batch_of_padded_rows(name: str) -> None:
    """As `mlx_lm.batch_generate` does: rows of several lengths, merged caches, then steps."""
    model = zoo.build(name)
    prompts = [[3, 9, 27, 81], [5, 10, 20], [7, 14]]
    try:
        expected = batch(model, prompts)
    except Exception as error:
        pytest.skip(f"mlx-lm has no batches of it: {error}")
    fast = accelerated(model)
    assert largest_difference(batch(fast, prompts), expected) < 1e-4
    all_by_programs(name, fast)


def batch(model: Any, prompts: list[list[int]]) -> mx.array:
    from mlx_lm.models.cache import make_prompt_cache

    rows = [make_prompt_cache(model) for _ in prompts]
    cache = [row[0].merge(list(row)) for row in zip(*rows, strict=True)]
    for repeated in (1, 4):  # the second time up to 16 tokens, twice what windows hold
        lengths = [repeated * len(p) for p in prompts]
        padding = [max(lengths) - length for length in lengths]
        for c in cache:
            c.prepare(lengths=lengths, right_padding=padding)
        rows = [[*repeated * p, *[0] * n] for p, n in zip(prompts, padding, strict=True)]
        model(mx.array(rows), cache=cache)
        mx.eval([c.state for c in cache])
        for c in cache:
            c.finalize()
    found = []
    for i in range(10):
        tokens = mx.array([[(7 * i + j) % 100] for j in range(len(prompts))])
        found.append(model(tokens, cache=cache)[:, -1])
        if i == 5:  # a row ends
            for c in cache:
                c.filter([0, 2])
            prompts = [prompts[0], prompts[2]]
    found = [f if f.shape[0] == 3 else mx.concatenate([f, f[:1]]) for f in found]
    mx.eval(found)
    return mx.stack(found)
