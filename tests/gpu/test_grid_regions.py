"""Regions on a GPU: the launch against its body, and ten thousand tokens of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

import qgraph as qg
from qgraph.compiler.pipeline import default_passes
from qgraph.examples import smollm2_files as files
from qgraph.examples.smollm2 import Llama
from qgraph.ir.loops import REGION
from qgraph.target import as_target
from tests.support import llama_reference as reference
from tests.support.arrays import to_numpy
from tests.support.reference import relative_error

GPU = mx.Device(mx.gpu, 0)
pytestmark = pytest.mark.skipif(
    not mx.is_available(GPU) or "sm_9" not in as_target(GPU).arch, reason="needs a Hopper GPU"
)


def llama(length: int, hidden: int = 2048, vocab: int = 2048, layers: int = 2) -> Llama:
    config = files.Config(
        layers=layers, hidden=hidden, ffn=2 * hidden, heads=hidden // 128, kv_heads=4, head_dim=128,
        vocab=vocab, rms_eps=1e-5, rope_base=1e4, context=length, bos_id=0, eos_id=-1,
        rope_traditional=False, group_size=64,
    )  # fmt: skip
    weights = {
        name: w.astype(mx.bfloat16) if w.dtype in (mx.float16, mx.float32) else w
        for name, w in files.toy_weights(config).items()
    }
    return Llama(config, weights, length=length, dtype=mx.bfloat16)


def test_a_step_gives_what_its_bodies_give() -> None:
    model = llama(64)

    def step(token: Any, position: Any, cache: Any) -> Any:
        h, _ = model.forward(token, cache, position)
        return model.logits(h)

    given = mx.array([[5]]), mx.array(3, mx.int32), model.empty_cache()
    program = qg.compile(step, *given, target="gpu")
    assert sum(node.op == REGION for _, node in program.plan.graph.walk()) == 3
    without = [p for p in default_passes(as_target("gpu")) if p.name != "form-grid-regions"]
    other = qg.compile(step, *given, target="gpu", passes=without)(*given).astype(mx.float32)
    y = program(*given).astype(mx.float32)
    assert mx.linalg.norm(y - other).item() < 2e-2 * mx.linalg.norm(other).item()
    twice = [program(*given), program(*given)]  # at once, if MLX were left to it
    mx.eval(twice)
    assert all(mx.array_equal(a, y.astype(a.dtype)).item() for a in twice)


def test_a_layer_is_as_near_to_float64_as_mlxs() -> None:
    """Logits of a model of one layer after each of 32 tokens; prints both errors (pytest -s)."""
    model = llama(32, layers=1)
    ids = mx.arange(32, dtype=mx.int32) * 17

    def all_logits(ids: Any, cache: Any) -> Any:
        def step(carry: Any, token: Any) -> Any:
            position, cache = carry
            h, cache = model.forward(token.reshape(1, 1), cache, position)
            return (position + 1, cache), model.logits(h)[0, -1]

        return qg.scan(step, (mx.array(0, mx.int32), cache), ids)[1]

    program = qg.compile(all_logits, ids, model.empty_cache(), target="gpu")
    assert any(
        n.op == "tail_attention" for _, node in program.plan.graph.walk() if node.op == REGION
        for n in node.bodies[0].nodes
    )  # fmt: skip
    ours = program(ids, model.empty_cache())
    theirs = files.mlx_lm_model(model.weights, model.config)
    cache = make_prompt_cache(theirs)
    made = mx.stack([theirs(ids[None, i : i + 1], cache=cache)[0, -1] for i in range(32)])
    right = reference.logits(model, to_numpy(ids))
    errors = [relative_error(to_numpy(y), right) for y in (ours, made)]
    print(f"from float64: ours {errors[0]:.3e}, MLX {errors[1]:.3e}")
    assert errors[0] <= errors[1]


def test_the_greatest_logit_is_found_in_the_region() -> None:
    """Of rows of 8,192 numbers, many of them equal."""
    model = llama(64, vocab=8192)

    def step(tokens: Any, position: Any, cache: Any) -> Any:
        h, _ = model.forward(tokens, cache, position)
        logits = model.logits(h)[:, 0]
        return qg.argmax(logits, axis=-1).astype(mx.int32), logits

    given = mx.array([[5], [7], [9]]), mx.array(3, mx.int32), model.empty_cache(3)
    program = qg.compile(step, *given, target="gpu")
    assert any(
        n.op == "argmax" for _, node in program.plan.graph.walk() if node.op == REGION
        for n in node.bodies[0].nodes
    )  # fmt: skip
    for _ in range(20):
        places, logits = program(*given)
        assert places.tolist() == mx.argmax(logits, axis=-1).tolist()


def test_ten_thousand_tokens() -> None:
    """None waits for ever, and the same tokens come again."""
    model = llama(64)
    step = qg.jit(model.decode(50), target="gpu")
    first = None
    for _ in range(200):
        state = mx.array(5, mx.int32), mx.array(0, mx.int32), mx.random.key(0)
        _, tokens = step(*state, model.empty_cache())
        first = tokens if first is None else first
        assert mx.array_equal(first, tokens).item()


def test_two_threads() -> None:
    """Their streams are not ordered by MLX, and two grids at once would wait for ever."""
    model = llama(64)
    step = qg.jit(model.decode(50), target="gpu")

    def tokens(first: int) -> Any:
        state = mx.array(first, mx.int32), mx.array(0, mx.int32), mx.random.key(0)
        return step(*state, model.empty_cache())[1].tolist()

    alone = [tokens(5), tokens(9)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            assert list(pool.map(tokens, (5, 9))) == alone
