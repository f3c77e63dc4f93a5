"""Programs of one token that copy no caches, as on CUDA; here by the CPU's forms of the kernels."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.lm.programs.tails import ROWS
from qgraph.target import Target

lm_cache: Any = pytest.importorskip("mlx_lm.models.cache")
llama: Any = pytest.importorskip("mlx_lm.models.llama")

CUDA = Target(mx.Device(mx.cpu, 0), "cuda", "", 2)
"""Passes as for CUDA, whose kernels have forms for CPUs too."""


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where buffers of 256 positions are long."""
    monkeypatch.setattr("qgraph.lm.programs.tails.LONG", 255)
    with mx.stream(mx.cpu):
        mx.disable_compile()
        yield
        mx.enable_compile()


@pytest.fixture
def models() -> tuple[Any, Any]:
    """A model, and the same through programs."""
    args = llama.ModelArgs(
        "llama", hidden_size=128, num_hidden_layers=2, intermediate_size=64, vocab_size=50,
        num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5,
    )  # fmt: skip
    mx.random.seed(3)
    model = llama.Model(args)
    mx.eval(model.parameters())
    return model, qg.lm.accelerate(model, target=CUDA, background=False, keep=False)


def computed(array: mx.array) -> bool:
    """Has somebody asked for an array?  MLX shows it in what it holds of memory alone."""
    before = mx.get_active_memory()
    mx.eval(array)
    mx.synchronize()
    return mx.get_active_memory() == before


def trimmed(cache: list[Any], model: Any) -> list[Any]:
    for c in cache:
        c.trim(3)
    return cache


def copied(cache: list[Any], model: Any) -> list[Any]:
    return copy.deepcopy(cache)


def looked_at(cache: list[Any], model: Any) -> list[Any]:
    mx.eval([c.state for c in cache])
    return cache


def written_by_the_model(cache: list[Any], model: Any) -> list[Any]:
    """mlx-lm writes into its arrays: the objects stay what they were."""
    model(mx.array([[7]]), cache=cache)
    return cache


def nothing(cache: list[Any], model: Any) -> list[Any]:
    return cache


CHANGES = [nothing, trimmed, copied, looked_at, written_by_the_model]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_same_as_the_model(models: tuple[Any, Any], change: Callable[..., Any]) -> None:
    """Over more tokens than a tail has rows, with something done to the caches among them."""
    model, fast = models
    own, mine = (lm_cache.make_prompt_cache(m) for m in models)
    prompt = mx.array([[3, 1, 4, 1, 5]])
    model(prompt, cache=own)
    fast(prompt, cache=mine)
    for i in range(ROWS + 9):
        if i == 5:
            own, mine = change(own, model), change(mine, model)
        token = mx.array([[i % 50]])
        want, got = model(token, cache=own), fast(token, cache=mine)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(own, mine, strict=True):
        assert a.offset == b.offset
        for x, y in zip((a.keys, a.values), (b.keys, b.values), strict=True):
            x, y = (array[..., : a.offset, :] for array in (x, y))
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    program = fast.qgraph.programs[-1]
    assert program.tails is not None
    assert not fast.qgraph.eager
    assert program.calls == ROWS + 9


def test_nothing_is_copied_until_somebody_asks(models: tuple[Any, Any]) -> None:
    _, fast = models
    cache = lm_cache.make_prompt_cache(fast)
    fast(mx.array([[3, 1, 4]]), cache=cache)
    for _ in range(3):
        mx.eval(fast(mx.array([[2]]), cache=cache))
    assert not computed(cache[0].keys)
    assert computed(cache[0].keys)


def test_what_is_beside_a_cache_goes_with_it(models: tuple[Any, Any]) -> None:
    _, fast = models

    def answered() -> int:
        cache = lm_cache.make_prompt_cache(fast)
        for _ in range(3):
            mx.eval(fast(mx.array([[3]]), cache=cache))
        return len(fast.qgraph.programs[-1].tails)

    assert answered() == 1
    gc.collect()
    assert len(fast.qgraph.programs[-1].tails) == 0


def test_a_program_says_what_lowering_decided(models: tuple[Any, Any]) -> None:
    _, fast = models
    fast(mx.array([[3]]), cache=lm_cache.make_prompt_cache(fast))
    (program,) = fast.qgraph.programs
    assert {e.made_by for e in program.ledger()} >= {"fuse-cache", "tail-states"}
