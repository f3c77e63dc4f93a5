"""SmolLM2 in qgraph against mlx-lm's llama on the same weights: logits, perplexity, tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.examples import smollm2_files as files
from qgraph.examples.smollm2 import Generator, Llama
from tests.support import llama_reference, reference
from tests.support.arrays import to_numpy

TEXT = "the cat sat on the mat."


@pytest.fixture(scope="module", params=["toy", "smollm2"])
def found(request: pytest.FixtureRequest) -> Iterator[files.Model]:
    pytest.importorskip("mlx_lm")
    pytest.importorskip("tokenizers")
    if request.param == "toy":
        yield files.toy()
        return
    try:
        yield files.load()
    except files.ModelFilesMissing as error:
        pytest.skip(str(error))


def test_logits_and_perplexity_are_mlx_lm_s(found: files.Model) -> None:
    text = TEXT if found.config.vocab == 256 else files.PARAGRAPH
    ids = found.tokenizer.encode(text)[:48]
    llama = Llama(found.config, found.weights, length=48)

    def scores(*args: Any) -> Any:
        h, cache = llama.forward(*args)
        return llama.logits(h), cache

    program = qg.compile(scores, mx.array([ids]), llama.empty_cache(), mx.array(0))
    fused = {e.case for e in program.plan.ledger() if e.decision == "fused"}
    assert {2, 6} <= fused  # 2: scales are float16, x is float32
    ops = {n.op for _, n in program.plan.graph.walk()}
    assert "matmul" not in ops
    logits, _ = program(mx.array([ids]), llama.empty_cache(), mx.array(0))
    expected = files.mlx_lm_model(found.weights, found.config)(mx.array([ids]))
    assert reference.relative_error(to_numpy(logits), to_numpy(expected)) < 2e-5
    ours, theirs = (files.perplexity(x, ids) for x in (logits, expected))
    assert abs(ours / theirs - 1) < 1e-4


@pytest.mark.parametrize("traditional", [False, True])
def test_float32_is_near_to_float64(traditional: bool) -> None:
    config = replace(files.TOY_CONFIG, rope_traditional=traditional)
    weights = {n: w.astype(mx.float32) if w.dtype == mx.float16 else w
               for n, w in files.toy_weights(config).items()}  # fmt: skip
    llama, ids = Llama(config, weights, length=16), np.arange(9) * 13
    h, _ = llama.forward(mx.array(ids)[None], llama.empty_cache())
    exact = llama_reference.logits(llama, ids)
    assert reference.relative_error(to_numpy(llama.logits(h)[0]), exact) < 2e-6


def test_the_loop_is_one_graph_and_greedy_tokens_are_mlx_lm_s(found: files.Model) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    ids = found.tokenizer.encode(TEXT)
    llama = Llama(found.config, found.weights, length=64)
    generator = Generator(llama, chunk=3)
    made = list(generator.tokens(ids, 7))
    loops = [n for n in generator.decode.plan.source.nodes if n.op == "scan"]
    assert len(loops) == 1
    assert len(loops[0].args["carried"]) == 3 + 2 * found.config.layers
    model = files.mlx_lm_model(found.weights, found.config)
    cache = make_prompt_cache(model)
    inputs, expected = mx.array([ids]), []
    for _ in range(7):
        token = mx.argmax(model(inputs, cache=cache)[0, -1])
        expected.append(int(token.item()))
        inputs = token.reshape(1, 1)
    assert made == expected[: len(made)]
    assert len(made) == 7 or expected[len(made)] == found.config.eos_id


def test_float_weights_are_quantized_once() -> None:
    """In the loop as written; in the pack step once optimized."""
    toy = files.toy()
    llama = Llama(toy.config, files.dequantized(toy.weights), length=32)
    state = (mx.array(5), mx.array(0), mx.random.key(0), llama.empty_cache())
    program = qg.compile(llama.decode(4), *state, release=False)
    source = program.plan.source
    (loop,) = [n for n in source.nodes if n.op == "scan"]
    inside = [n for _, n in loop.bodies[0].walk() if n.op == "quantize"]
    products = 7 * toy.config.layers + 1
    assert len(inside) == products
    after = [(graph, n) for graph, n in program.plan.graph.walk() if n.op == "quantize"]
    assert [n.stage for _, n in after] == ["pack"] * products
    assert all(graph is program.plan.graph for graph, _ in after)
    plain = qg.compile(source, passes=[])
    (_, made), (_, expected) = program(*state), plain(*state)
    np.testing.assert_array_equal(to_numpy(made), to_numpy(expected))


def test_sampling_follows_the_key() -> None:
    toy = files.toy()
    generator = Generator(Llama(toy.config, toy.weights, length=64), temperature=1.5, chunk=4)
    runs = [list(generator.tokens([1, 2, 3], 12, seed=seed)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_cache_that_is_too_short_is_refused() -> None:
    """MLX does not check where `slice_update` writes."""
    toy = files.toy()
    generator = Generator(Llama(toy.config, toy.weights, length=32), chunk=4)
    with pytest.raises(ValueError, match=r"need a cache of 36 positions, this one has 32"):
        next(generator.tokens([1, 2, 3], 16))
