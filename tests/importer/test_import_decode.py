"""A decode loop around models of mlx-lm: a cache of fixed length, its offset an array."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.errors import UnsupportedError
from tests.support import zoo

pytest.importorskip("mlx_lm")

LENGTH, STEPS = 24, 12


class FixedCache:
    """What mlx-lm's models ask of a cache, with room for `LENGTH` tokens from the start."""

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array) -> None:
        self.keys, self.values, self.offset = keys, values, offset

    def make_mask(self, count: int, **_: Any) -> mx.array:
        positions = self.offset + mx.arange(count)
        return mx.arange(self.keys.shape[2]) <= positions[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start = self.offset.reshape(1)
        self.keys = mx.slice_update(self.keys, keys, start, axes=(2,))
        self.values = mx.slice_update(self.values, values, start, axes=(2,))
        return self.keys, self.values


def step_of(lm: Any) -> Any:
    def step(tokens: mx.array, offset: mx.array, arrays: Any) -> Any:
        cache = [FixedCache(keys, values, offset) for keys, values in arrays]
        logits = lm(tokens, cache=cache)
        return logits[:, -1], [(c.keys, c.values) for c in cache]

    return step


def start_of(lm: Any) -> Any:
    zeros = mx.zeros((1, 2, LENGTH, 16))
    return zoo.IDS, mx.array(0), [(zeros, zeros) for _ in lm.layers]


# Given ones: the likeliest token of a model of random numbers is always the same.
TOKENS = mx.array([[[(7 * i + 3) % 100]] for i in range(STEPS)])


def by_mlx_lm(lm: Any) -> mx.array:
    """Logits after the prompt and after each of the tokens, with mlx-lm's own cache."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(lm)
    return mx.stack([lm(t, cache=cache)[:, -1] for t in (zoo.IDS, *TOKENS)])


def agree(actual: mx.array, lm: Any) -> None:
    expected = by_mlx_lm(lm)
    assert (mx.abs(actual - expected).max() / mx.abs(expected).max()).item() < 1e-4
    assert mx.abs(expected[1:] - expected[:-1]).max().item() > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_the_same_logits_as_mlx_lm(name: str) -> None:
    lm = zoo.build(name)
    step, start = step_of(lm), start_of(lm)
    logits, cache = qg.compile(qg.from_mlx(step, *start), target="cpu")(*start)
    offset = mx.array(zoo.IDS.shape[1])
    decode = qg.compile(qg.from_mlx(step, TOKENS[0], offset, cache), target="cpu")
    found = [logits]
    for token in TOKENS:
        logits, cache = decode(token, offset, cache)
        offset = offset + 1
        found.append(logits)
    agree(mx.stack(found), lm)


def test_the_loop_itself_as_a_graph() -> None:
    """`qg.call` in the body of a scan: one program for all tokens, weights packed once."""
    lm = zoo.build("llama")
    step, start = step_of(lm), start_of(lm)
    logits, cache = qg.compile(qg.from_mlx(step, *start), target="cpu")(*start)

    def decode(tokens: Any, offset: Any, cache: Any) -> Any:
        def body(carry: Any, token: Any) -> Any:
            offset, cache = carry
            logits, cache = qg.call(step, token, offset, cache)
            return (offset + 1, cache), logits

        return qg.scan(body, (offset, cache), tokens)[1]

    given = (TOKENS, mx.array(zoo.IDS.shape[1]), cache)
    graph = qg.trace(decode, *given)
    program = qg.compile(graph, target="cpu")
    agree(mx.concatenate([logits[None], program(*given)]), lm)
    packed = qg.compile(graph, target="cpu", quantize=qg.Quantize(8, group_size=32))
    assert {w.bits for w in packed.plan.weights()} == {8}
    assert {n.stage for n in packed.plan.graph.nodes if n.op == "quantize"} == {"pack"}


def test_a_cache_object_is_refused_in_words() -> None:
    from mlx_lm.models.cache import make_prompt_cache

    lm = zoo.build("llama")
    with pytest.raises(UnsupportedError, match=r"cache\.0 is a KVCache") as caught:
        qg.from_mlx(lm, zoo.IDS, cache=make_prompt_cache(lm))
    assert "arrays" in caught.value.hint
