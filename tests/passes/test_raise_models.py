"""Raising on models of mlx-lm: what is there before and after, and that no bit changes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.ir import Graph
from tests.support import zoo
from tests.support.passes import passes_without
from tests.support.raising import raised

pytest.importorskip("mlx_lm")

# Norms, rotations and attentions of two layers each, as the models are written.
MODELS = {
    "llama": (5, 4, 2),
    "qwen2": (5, 4, 2),
    "qwen3": (9, 4, 2),
    "gemma": (5, 4, 2),
    "gemma3_text": (13, 4, 2),
    "phi3": (5, 4, 2),
    "mixtral": (5, 4, 2),
    "olmo2": (9, 4, 2),
    "deepseek_v3": (9, 4, 2),
    "gpt_oss": (5, 4, 2),
    "nanochat": (10, 4, 2),
    "gpt2": (5, 0, 2),
    "gpt_neox": (5, 4, 2),
    "cohere": (7, 4, 2),
    "phi": (3, 4, 2),
}
FAST = {
    "fast.rms_norm": 0, "fast.layer_norm": 0, "fast.rope": 1,
    "fast.scaled_dot_product_attention": 2,
}  # fmt: skip
LAYER_NORMS = {"gpt2", "gpt_neox", "cohere", "phi"}


def counts(graph: Graph) -> Counter[str]:
    return Counter(node.op for _, node in graph.walk())


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_raised_and_no_bit_changes(name: str) -> None:
    model = zoo.build(name)
    ids, _ = zoo.inputs(name)
    graph = qg.from_mlx(model, ids)
    after = raised(graph)
    found = counts(after)
    fast = [0, 0, 0]
    for op, kind in FAST.items():
        fast[kind] += found[op]
    assert tuple(fast) == MODELS[name]
    assert found["fast.layer_norm"] == (fast[0] if name in LAYER_NORMS else 0)
    assert not {"rsqrt", "cos", "sin"} & set(found)
    assert after.count() < 0.7 * graph.count()
    assert mx.array_equal(qg.compile(after, target="cpu", passes=[])(ids), model(ids))


def test_what_stays_in_gemma2_and_in_routers() -> None:
    """gemma2 caps its scores, which no op of MLX does; a router's softmax is no attention."""
    ids, _ = zoo.inputs("gemma2")
    found = counts(raised(qg.from_mlx(zoo.build("gemma2"), ids)))
    assert (found["fast.rms_norm"], found["fast.rope"], found["softmax"]) == (9, 4, 2)
    found = counts(raised(qg.from_mlx(zoo.build("mixtral"), ids)))
    assert (found["fast.scaled_dot_product_attention"], found["softmax"]) == (2, 2)


def test_the_contracts_hold_for_a_whole_model() -> None:
    model = zoo.build("qwen3")
    ids, _ = zoo.inputs("qwen3")
    plan = qg.optimize(qg.from_mlx(model, ids), target="cpu")
    plan.check(ids)
    raising = [s for s in plan.steps if s.name.startswith("raise-") and s.changed]
    assert [s.name for s in raising] == ["raise-rms-norm", "raise-rope", "raise-attention"]
    assert all(s.contract == "exact" for s in raising)
    assert all(s.after.count() < s.before.count() for s in raising)


def test_the_backward_pass_of_attention_is_left() -> None:
    model = zoo.build("llama")
    ids, _ = zoo.inputs("llama")

    def loss(embeddings: mx.array) -> mx.array:
        return model(ids, input_embeddings=embeddings).sum()

    x = mx.random.normal((*ids.shape, zoo.WIDTH), key=mx.random.key(0))
    gradient = mx.grad(loss)
    graph = qg.from_mlx(gradient, x)
    assert mx.allclose(qg.compile(graph, target="cpu")(x), gradient(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["growing", "rotating", "batch"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_steps_with_a_cache_in_half_precision(name: str, kind: str, rows: int) -> None:
    """Offsets that are numbers and tensors, masks that are none, causal and arrays."""
    from mlx_lm.models import cache

    kinds: dict[str, Callable[[], Any]] = {
        "growing": cache.KVCache,
        "rotating": lambda: cache.RotatingKVCache(4),
        "batch": lambda: cache.BatchKVCache([0, 2]),
    }
    model = zoo.build(name)
    model.set_dtype(mx.bfloat16)
    caches = [kinds[kind]() for _ in model.layers]
    model(mx.arange(12).reshape(2, 6), cache=caches)
    mx.eval(model.parameters(), [c.state for c in caches])

    def step(ids: mx.array, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
        mine = [copy.copy(c) for c in caches]
        for c in mine:  # they write into their arrays
            c.keys, c.values = mx.array(c.keys).astype(dtype), mx.array(c.values).astype(dtype)
        return model(ids, cache=mine)

    ids = mx.arange(2 * rows).reshape(2, rows)
    after = raised(qg.from_mlx(step, ids))
    found = counts(after)
    assert found["fast.scaled_dot_product_attention"] == 2
    assert found["fast.rope"] == MODELS[name][1]
    assert not {"rsqrt", "cos", "softmax"} & set(found)
    assert mx.array_equal(qg.compile(after, target="cpu", passes=[])(ids), step(ids))
    graph, rounded = qg.from_mlx(step, ids), step(ids)
    plain = qg.compile(graph, target="cpu", passes=passes_without("stored-scales", "form-regions"))
    assert mx.allclose(plain(ids), rounded, rtol=2e-2, atol=2e-2)
    result = qg.compile(graph, target="cpu")(ids)
    model.set_dtype(mx.float32)  # the same weights and caches: no step rounds to half precision
    exact = step(ids, mx.float32)
    assert _distance(result, exact) <= 1.5 * _distance(rounded, exact) < 0.03


def _distance(a: mx.array, b: mx.array) -> float:
    """Of `a` from `b`, as a share of `b`."""
    return float(mx.sqrt(mx.sum((a - b) ** 2) / mx.sum(b**2)))
