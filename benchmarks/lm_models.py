"""Models of mlx-lm with random weights, for the benchmark of generating."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

_COMMON: dict[str, Any] = {
    "vocab_size": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_key_value_heads": 4,
    "num_attention_heads": 16, "head_dim": 64, "max_position_embeddings": 32768,
    "tie_word_embeddings": False, "attention_bias": False, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 384, "num_experts": 64, "num_experts_per_tok": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 24, "intermediate_size": 3072},
    "qwen3_moe": {"num_hidden_layers": 24, "intermediate_size": 3072, **_EXPERTS},
    "gemma3_text": {
        "num_hidden_layers": 24, "intermediate_size": 4096, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "rope_theta": 1e6,
    },
    "gpt_oss": {
        "num_hidden_layers": 16, "intermediate_size": 768, "num_local_experts": 32,
        "num_experts_per_tok": 4, "num_key_value_heads": 4,
    },
    "deepseek_v3": {
        "num_hidden_layers": 16, "intermediate_size": 3072, "moe_intermediate_size": 384,
        "n_routed_experts": 64, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 256, "q_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64,
        "num_key_value_heads": 16,
    },
    "mamba2": {
        "num_hidden_layers": 24, "num_heads": 32, "intermediate_size": 2048, "state_size": 64,
        "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1, "use_bias": False,
        "use_conv_bias": True, "time_step_limit": (0.0, 100.0), "time_step_rank": 64,
    },
    "qwen3_next": {
        "num_hidden_layers": 16, "intermediate_size": 3072, "linear_num_value_heads": 16,
        "linear_num_key_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5,
        "shared_expert_intermediate_size": 384, **_EXPERTS,
    },
    "cohere2": {
        "num_hidden_layers": 24, "intermediate_size": 3072, "sliding_window": 1024,
        "layer_norm_eps": 1e-5,
    },
    "llama-8b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "rope_theta": 5e5,
    },
}  # fmt: skip
"""What each has beside hidden size 1024, and the shape of Llama-3-8B."""


def build(name: str, dtype: mx.Dtype, bits: int | None, layers: int | None = None) -> Any:
    """A model with random weights.

    Args:
        bits: of its weights, or None for those of `dtype`.
        layers: instead of its own number.
    """
    config = {"hidden_size": 1024, **_COMMON, **MODELS[name]}
    if layers is not None:
        config["num_hidden_layers"] = layers
    architecture = name.partition("-")[0]
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    mx.random.seed(0)
    args = module.ModelArgs.from_dict({"model_type": architecture, **config})
    model = module.Model(args)
    model.set_dtype(dtype)
    if bits is not None:
        predicate = getattr(model, "quant_predicate", None)

        def packs(path: str, part: Any) -> Any:
            if not hasattr(part, "to_quantized"):
                return False
            return predicate(path, part) if predicate is not None else True

        nn.quantize(model, group_size=64, bits=bits, class_predicate=packs)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one by one, so that no more than one float weight is there
    model.eval()
    return model
