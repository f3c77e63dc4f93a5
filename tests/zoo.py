"""Every architecture of mlx-lm that a tiny common configuration builds, imported and compared.

    python -m tests.zoo

prints for each what came of it: exact, or the step at which it fell out and why.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

import qgraph as qg

LAYERS, WIDTH, EXPERTS, VOCABULARY = 2, 64, 4, 100
COMMON: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "block_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner", "intermediate_dim",
                     "block_ff_dim"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH),
    **dict.fromkeys(("rms_norm_eps", "norm_epsilon", "layer_norm_eps", "norm_eps",
                     "layer_norm_epsilon", "layernorm_epsilon"), 1e-5),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_global_base_freq",
                     "rotary_emb_base"), 1e4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "seq_length",
                     "max_seq_len"), 64),
    **dict.fromkeys(("head_dim", "global_head_dim", "head_size", "kv_channels", "v_head_dim",
                     "query_pre_attn_scalar", "qk_rope_head_dim", "qk_nope_head_dim",
                     "linear_key_head_dim", "linear_value_head_dim", "state_size",
                     "ssm_state_size"), 16),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
                     "linear_num_value_heads", "conv_kernel", "linear_conv_kernel_dim"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "linear_num_key_heads", "full_attention_interval",
                     "sliding_window_pattern", "no_rope_layer_interval", "expand",
                     "layer_group_size"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group",
                     "n_groups", "decoder_sparse_step", "moe_layer_freq", "group_norm_size",
                     "first_k_dense_replace"), 1),
    **dict.fromkeys(("logits_scaling", "embedding_multiplier", "residual_multiplier",
                     "routed_scaling_factor", "logit_scale", "scale_emb", "scale_depth",
                     "ffn_dim_multiplier", "block_ffn_dim_multiplier"), 1.0),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "bias", "qkv_bias", "conv_bias",
                     "layer_norm_bias", "rope_traditional", "residual_in_fp32",
                     "block_auto_adjust_ff_dim"), False),
    **dict.fromkeys(("tie_word_embeddings", "norm_topk_prob", "use_qk_norm", "use_conv_bias",
                     "use_parallel_residual"), True),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "block_multiple_of"), 32),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), 0.5),
    **dict.fromkeys(("sliding_window", "attention_window_size", "time_step_rank"), 8),
    "attention_multiplier": 0.25, "attention_dropout": 0.0, "hidden_act": "silu",
    "scoring_func": "softmax", "topk_method": "greedy", "mlp_only_layers": [],
    "layer_types": ["full_attention"] * LAYERS, "block_types": ["recurrent", "attention"],
    "rope_scaling": None, "dim_model_base": WIDTH, "conv_L_cache": 3,
    "time_step_limit": (0.0, 100.0),
}  # fmt: skip
_NO_AUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite"), _NO_AUX),
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["attention"] * LAYERS},
}
IDS = mx.array([[1, 7, 3, 99, 4]])
MOST_BYTES = 30_000_000
"""A model larger than this was not made tiny by the configuration; comparing it takes too long."""


def architectures() -> list[str]:
    import mlx_lm.models

    return [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]


def build(name: str) -> Any:
    """The model with random weights; raises what the architecture raises."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = {"model_type": name, **COMMON, **OWN.get(name, {})}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"text_config": dict(config), **config}))
    if sum(array.nbytes for _, array in tree_flatten(model.parameters())) > MOST_BYTES:
        raise ValueError("the common configuration leaves it large")
    model.eval()
    mx.eval(model.parameters())
    return model


def equal(model: Any) -> bool:
    """Does its graph, without passes, give the very logits of the model, on two inputs?"""
    program = qg.compile(qg.from_mlx(model, IDS), target="cpu", passes=[])
    return all(
        mx.array_equal(program(tokens), model(tokens), equal_nan=True).item()
        for tokens in (IDS, IDS[:, ::-1] + 0)
    )


def main() -> None:
    outcomes = []
    for name in architectures():
        try:
            outcome = "exact" if equal(build(name)) else "differs"
        except (Exception, SystemExit) as error:
            outcome = f"{type(error).__name__}: {str(error)[:100]!r}"
        outcomes.append(outcome)
        print(f"{name}: {outcome}", flush=True)
    print(f"{outcomes.count('exact')} exact of {len(outcomes)}")


if __name__ == "__main__":
    main()
