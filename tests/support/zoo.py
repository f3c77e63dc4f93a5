"""Every architecture of mlx-lm that a tiny common configuration builds, imported and compared.

    python -m tests.support.zoo

prints for each what came of it: exact, or the step at which it fell out and why.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import types
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

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
_MIXED = ["sliding_attention", "full_attention"]
_ROPE = {"rope_theta": 1e4, "rope_type": "default"}
_ROPES = dict.fromkeys(_MIXED, _ROPE)
_YARN = {"type": "yarn", "rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0,
         "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
         "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}  # fmt: skip
_INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
_LONGCAT = {"attention_method": "MLA", "zero_expert_type": "identity", "moe_topk": 2,
            "expert_ffn_hidden_size": WIDTH, "zero_expert_num": 1, "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True}  # fmt: skip
_LINEAR = {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 16,
           "short_conv_kernel_size": 4}  # fmt: skip
_GEMMA4 = {
    "layer_types": _MIXED * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
}
_LFM2 = {"layer_types": ["conv", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "solar_open",
                     "kimi_k25", "kimi_vl"), _NO_AUX),
    "gpt_oss": {"layer_types": _MIXED},
    "olmo3": {"layer_types": _MIXED},
    **dict.fromkeys(("gemma4", "gemma4_text"), _GEMMA4),
    **dict.fromkeys(("lfm2", "lfm2-vl"), _LFM2),
    "afm7": {"hidden_dim": WIDTH, "num_kv_reuse_layers": 1, "num_kv_heads": 2},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2,
                    "tie_word_embeddings": False},
    "dbrx": {"ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "deepseek_v2": {"rope_scaling": _YARN},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _MIXED, "is_moe_layer": [False, True], **_NO_AUX},
    "gemma3n": {
        "num_kv_shared_layers": 1, "vocab_size_per_layer_input": VOCABULARY,
        "num_hidden_layers": 4, "final_logit_softcapping": 30.0, "layer_types": _MIXED * 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 4, "altup_coef_clip": 120.0, "altup_correct_scale": True,
        "altup_active_idx": 0, "laurel_rank": 8,
    },
    "glm_moe_dsa": {**_NO_AUX, **_INDEXER, "rope_parameters": _ROPE},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": WIDTH,
        "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_proj_bias": False, "mamba_d_state": 16,
        "mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True,
    },
    "hunyuan": {"moe_topk": 2, "num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_cla": True,
                "cla_share_factor": 2,
                "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "ntk"}},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
              "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2},
    "kimi_k3": {"hidden_act": "situ", "activation_situ_beta": 4.0, "linear_attn_config": _LINEAR,
                "num_experts_per_token": 2, "attn_res_block_size": 1, "num_key_value_heads": 4},
    "kimi_linear": {"linear_attn_config": _LINEAR, "model_max_length": 64},
    "lfm2_moe": {**_LFM2, "use_expert_bias": True, "num_dense_layers": 1},
    "lille-130m": {"block_size": 64, "n_kv_heads": 2},
    "llama4": {"attention_chunk_size": 8, "interleave_moe_layer_step": 2,
               "intermediate_size_mlp": 2 * WIDTH, "num_experts_per_tok": 1,
               "num_hidden_layers": 4},
    "llama4_text": {"intermediate_size_mlp": 2 * WIDTH, "no_rope_layers": [1, 0]},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": {**_LONGCAT, "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 2,
                            "emb_split_num": 2},
    "mellum": {"layer_types": _MIXED, "rope_parameters": _ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "layer_types": _MIXED,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
        "sliding_window_size": 8, "swa_rope_theta": 1e4, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16,
        "n_shared_experts": None, **_NO_AUX,
    },
    "minicpm3": {"rope_scaling": {**_YARN, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
    "minimax": {"shared_intermediate_size": WIDTH, "rotary_dim": 8},
    "minimax_m3_vl": {"moe_layer_freq": [0, 1], "num_local_experts": EXPERTS,
                      "dense_intermediate_size": WIDTH, "shared_intermediate_size": WIDTH},
    "ministral3": {"rope_parameters": _YARN},
    "mistral4": {"rope_parameters": _YARN},
    "muse_spark": {
        "post_norm_eps": 1e-5, "rope_parameters": _ROPE, "layer_rope_theta": [1e4, 0.0],
        "layer_types": _MIXED, "final_logit_softcapping": 30.0, "output_multiplier": 1.0,
        "moe_hidden_size": WIDTH, "num_shared_experts": 0,
    },
    "nemotron-nas": {"block_configs": [
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
    ]},
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "-", "E"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "mamba_proj_bias": False,
        "moe_shared_expert_intermediate_size": WIDTH,
    },
    "olmo": {"mlp_hidden_size": 2 * WIDTH},
    "olmo_hybrid": {"linear_allow_neg_eigval": True,
                    "layer_types": ["linear_attention", "full_attention"]},
    "openelm": {"num_transformer_layers": LAYERS, "model_dim": WIDTH, "ffn_dim_divisor": 16,
                "num_query_heads": [4, 4], "num_kv_heads": [2, 2], "ffn_multipliers": [1.0, 2.0]},
    # It writes to the logits of tokens by number, up to 100351.
    "phi3small": {"vocab_size": 100_352, "dense_attention_every_n_layers": 2,
                  "ff_intermediate_size": 2 * WIDTH, "gegelu_limit": 20.0,
                  "blocksparse_block_size": 32},
    "phixtral": {"num_vocab": VOCABULARY, "model_dim": WIDTH, "rotary_dim": 8},
    "plamo": {"n_shared_head": 2, "num_attention_heads": 4},
    "prism_hadamard_qwen35": {
        "tensor_namespace": "mlx-vlm-qwen3_5", "intermediate_size": 512, "num_experts": 0,
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": "model.layers.1.mlp.down_proj", "embedding": False,
                     "dtype": "float16", "block": 512}],
    },
    "recurrent_gemma": {"conv1d_width": 4, "logits_soft_cap": 30.0},
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8,
              "decay_low_rank_dim": 8},
    "spark2_5": {"rope_parameters": _ROPES, "layer_types": _MIXED, "hidden_act": "gelu"},
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {"num_attention_groups": 2, "moe_num_experts": EXPERTS, "moe_top_k": 2,
                "share_expert_dim": WIDTH, "moe_layers_enum": "1"},
}  # fmt: skip
SHORT = {"olmo": mx.array([[7]])}
"""Inputs of architectures that take no longer ones: the mask of olmo is a word it then adds."""
IDS = mx.array([[1, 7, 3, 99, 4]])
MOST_BYTES = 30_000_000
"""A model larger than this was not made tiny by the configuration; comparing it takes too long."""


def architectures() -> list[str]:
    """The modules of mlx-lm that define a model; the others are what models share."""
    import mlx_lm.models

    root = Path(mlx_lm.models.__path__[0])
    return [
        module.name
        for module in pkgutil.iter_modules([str(root)])
        if re.search(r"^class Model\b", (root / f"{module.name}.py").read_text(), re.M)
    ]


def build(name: str) -> Any:
    """The model with random weights; raises what the architecture raises."""
    # The module of olmo only asks whether this package is there, and never uses it.
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = {"model_type": name, **COMMON, **OWN.get(name, {})}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"text_config": dict(config), **config}))
    if sum(array.nbytes for _, array in tree_flatten(model.parameters())) > MOST_BYTES:
        raise ValueError("the common configuration leaves it large")
    model.eval()
    weights = dict(tree_flatten(model.parameters()))
    model.update(tree_unflatten(list(_filled(weights).items())))
    mx.eval(model.parameters())
    return model


def _filled(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Random numbers where the model starts with zeros, which would hide what reads them.

    Tables of indices stay as they are.
    """
    filled = dict(weights)
    for path, array in weights.items():
        if array.size == 0 or mx.any(array != 0).item():
            continue
        if mx.issubdtype(array.dtype, mx.floating):
            filled[path] = mx.random.normal(array.shape, array.dtype, scale=0.1)
        elif f"{path.removesuffix('weight')}scales" in weights:
            filled[path] = mx.random.randint(0, 2**31 - 1, array.shape).astype(array.dtype)
    return filled


def inputs(name: str) -> tuple[mx.array, mx.array]:
    """Two batches of tokens for the architecture, of one shape."""
    ids = SHORT.get(name, IDS)
    return ids, (ids[:, ::-1] + 1) % VOCABULARY


def equal(name: str, model: Any) -> bool:
    """Does its graph, without passes, give the very logits of the model, on two inputs?"""
    first, second = inputs(name)
    program = qg.compile(qg.from_mlx(model, first), target="cpu", passes=[])
    return all(
        mx.array_equal(program(tokens), model(tokens), equal_nan=True).item()
        for tokens in (first, second)
    )


def main() -> None:
    outcomes = []
    for name in architectures():
        try:
            outcome = "exact" if equal(name, build(name)) else "differs"
        except (Exception, SystemExit) as error:
            outcome = f"{type(error).__name__}: {str(error)[:100]!r}"
        outcomes.append(outcome)
        print(f"{name}: {outcome}", flush=True)
    print(f"{outcomes.count('exact')} exact of {len(outcomes)}")


if __name__ == "__main__":
    main()
