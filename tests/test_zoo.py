"""Architectures of mlx-lm: the imported graph gives the very logits of the model.

By default a few of them; all that are listed with QGRAPH_ZOO=all.
"""

from __future__ import annotations

import os

import mlx.core as mx
import pytest

import qgraph as qg
from tests import zoo

pytest.importorskip("mlx_lm")

EXACT = [
    "Klear", "afmoe", "bailing_hybrid", "bailing_moe", "bailing_moe_linear", "bailing_moe_v3",
    "cohere", "cohere2", "deepseek", "deepseek_v3", "deepseek_v32", "deepseek_v41", "dots1",
    "ernie4_5", "ernie4_5_moe", "exaone", "falcon_h1", "gear", "gemma", "gemma2", "gemma3",
    "gemma3_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox",
    "gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm2",
    "internlm3", "iquestloopcoder", "laguna", "llama", "mamba", "mamba2", "mimo", "minicpm",
    "mistral3", "mixtral", "muse_glimmer", "nanbeige", "nanochat", "nemotron", "olmo2", "olmoe",
    "phi", "phi3", "phimoe", "pixtral", "plamo2", "plamo3", "qwen", "qwen2", "qwen2_moe",
    "qwen2_vl", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl",
    "qwen3_vl_moe", "seed_oss", "smollm3", "starcoder2", "telechat3", "youtu_llm",
]  # fmt: skip
FEW = EXACT if os.environ.get("QGRAPH_ZOO") == "all" else EXACT[::8]


@pytest.mark.parametrize("name", FEW)
def test_architecture(name: str) -> None:
    model = zoo.build(name)
    assert zoo.equal(model)
    program = qg.compile(qg.from_mlx(model, zoo.IDS), target="cpu")
    expected = model(zoo.IDS)
    scale = mx.abs(expected).max()
    assert mx.isfinite(scale).item()
    assert scale.item() > 0  # logits of zero would prove nothing
    assert (mx.abs(program(zoo.IDS) - expected).max() / scale).item() < 1e-4
