"""Architectures of mlx-lm: the imported graph gives the very logits of the model.

By default a few of them; all that are listed with QGRAPH_ZOO=all.
"""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.errors import UnsupportedError
from tests.support import zoo

pytest.importorskip("mlx_lm")

EXACT = [
    "Klear", "afm7", "afmoe", "apertus", "baichuan_m1", "bailing_hybrid", "bailing_moe",
    "bailing_moe_linear", "bailing_moe_v3", "cohere", "cohere2", "deepseek", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "deepseek_v41", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone", "exaone4", "exaone_moe", "falcon_h1", "gear", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gemma3n", "gemma4", "gemma4_text", "glm", "glm4", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj",
    "granite", "granitemoe", "granitemoehybrid", "helium", "hunyuan", "hunyuan_v1_dense",
    "internlm2", "internlm3", "iquestloopcoder", "jamba", "kimi_k25", "kimi_k3", "kimi_linear",
    "kimi_vl", "laguna", "lfm2-vl", "lfm2", "lfm2_moe", "lille-130m", "llama", "llama4",
    "llama4_text", "longcat_flash", "longcat_flash_ngram", "mamba", "mamba2", "mellum",
    "mimo", "mimo_v2_flash", "minicpm", "minicpm3", "minimax", "minimax_m3_vl", "ministral3",
    "mistral3", "mistral4", "mixtral", "muse_glimmer", "nanbeige", "nanochat", "nemotron-nas",
    "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openelm",
    "phi", "phi3", "phi3small", "phimoe", "phixtral", "pixtral", "plamo", "plamo2", "plamo3",
    "prism_hadamard_qwen35", "qwen", "qwen2", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_5",
    "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "recurrent_gemma",
    "rwkv7", "seed_oss", "smollm3", "spark2_5", "stablelm", "starcoder2", "step3p5", "talkie",
    "telechat3", "youtu_llm",
]  # fmt: skip
REFUSED = {
    "bitnet": "CustomKernel",  # a Metal kernel of its own for three-valued weights
    "dbrx": "evaluates an array",  # .tolist() on the experts that the router chose
    "muse_spark": "CustomKernel",  # Metal kernels for routing and norms
}
"""What cannot be imported, and the words that say so."""
FEW = EXACT if os.environ.get("QGRAPH_ZOO") == "all" else EXACT[::8]
OTHERS = EXACT if os.environ.get("QGRAPH_ZOO") == "all" else EXACT[3::20]


def test_every_architecture_is_listed() -> None:
    assert set(zoo.architectures()) == {*EXACT, *REFUSED}
    assert len(EXACT) >= 100


def close(program: qg.Program, model: Any, ids: mx.array, tolerance: float) -> None:
    """The largest difference of the logits is below the tolerance times the largest logit."""
    expected, actual = model(ids), program(ids)
    assert actual.dtype == expected.dtype
    # Logits of -inf are of tokens that phi3small never gives.
    forbidden = expected == -float("inf")
    assert mx.array_equal(actual == -float("inf"), forbidden).item()
    expected, actual = (
        mx.where(forbidden, 0, logits).astype(mx.float32) for logits in (expected, actual)
    )
    scale = mx.abs(expected).max()
    assert mx.isfinite(scale).item()
    assert scale.item() > 0  # logits of zero would prove nothing
    assert (mx.abs(actual - expected).max() / scale).item() < tolerance


@pytest.mark.parametrize("name", FEW)
def test_architecture(name: str) -> None:
    model = zoo.build(name)
    assert zoo.equal(name, model)
    ids, _ = zoo.inputs(name)
    close(qg.compile(qg.from_mlx(model, ids), target="cpu"), model, ids, 1e-4)


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in zoo.SHORT])
def test_other_inputs(name: str) -> None:
    """One token, and two rows longer than the windows of attention."""
    model = zoo.build(name)
    for ids in (mx.array([[5]]), mx.arange(40).reshape(2, 20) * 7 % zoo.VOCABULARY):
        graph = qg.from_mlx(model, ids)
        exact = qg.compile(graph, target="cpu", passes=[])
        assert mx.array_equal(exact(ids), model(ids), equal_nan=True).item()
        close(qg.compile(graph, target="cpu"), model, ids, 1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_bfloat16(name: str) -> None:
    model, (ids, _) = zoo.build(name), zoo.inputs(name)
    model.set_dtype(mx.bfloat16)
    try:
        expected = model(ids)
        mx.eval(expected)
    except RuntimeError as error:
        pytest.skip(f"not on a CPU: {error}")
    graph = qg.from_mlx(model, ids)
    exact = qg.compile(graph, target="cpu", passes=[])
    assert mx.array_equal(exact(ids), expected, equal_nan=True).item()
    close(qg.compile(graph, target="cpu"), model, ids, 3e-2)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        qg.from_mlx(zoo.build(name), zoo.IDS)
