"""A model as a folder that mlx-lm loads: SmolLM2-135M, or a toy that needs no download.

    python -m qgraph.examples.checkpoint FOLDER

writes SmolLM2 the way `mlx_lm.convert` does: `config.json`, `model.safetensors` and the
tokenizer's files.  Then

    qgraph generate --model FOLDER --prompt "What is the capital of France?"
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from qgraph.examples import smollm2_files as files

CHAT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    f"{files.SYSTEM_PROMPT}<|im_end|>\n{{% endif %}}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as SmolLM2 was trained on it."""


def write(model: files.Model, folder: str | Path, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """Write the model to a folder; returns it.

    Args:
        model: as `smollm2_files.load` or `toy` gives it.
        dtype: of scales, biases and norms, and so of what the model computes in.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    weights = files.cast(model.weights, dtype)
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(_config(model.config), indent=2))
    tokenizer, settings = _tokenizer(model)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return path


def _config(c: files.Config) -> dict[str, Any]:
    packing: dict[str, Any] = {"group_size": c.group_size, "bits": 4}
    packing |= {"model.embed_tokens": {"group_size": c.group_size, "bits": 8}}
    return {
        "model_type": "llama", "hidden_size": c.hidden, "num_hidden_layers": c.layers,
        "intermediate_size": c.ffn, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "rms_norm_eps": c.rms_eps,
        "vocab_size": c.vocab, "max_position_embeddings": c.context, "rope_theta": c.rope_base,
        "rope_traditional": c.rope_traditional, "tie_word_embeddings": c.tied,
        "bos_token_id": c.bos_id, "eos_token_id": c.eos_id,
        "quantization": packing, "quantization_config": packing,
    }  # fmt: skip


def _tokenizer(model: files.Model) -> tuple[Any, dict[str, Any]]:
    """A tokenizer of the `tokenizers` library, and what transformers wants to know of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}
    settings |= {"clean_up_tokenization_spaces": False}
    if isinstance(model.tokenizer, files.BpeTokenizer):
        library = model.tokenizer.library
        settings |= {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    else:  # the toy's: a token is a byte
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        library = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        settings |= {"eos_token": alphabet[model.config.eos_id]}
    library.decoder = decoders.ByteLevel()
    return library, settings


def main(folder: str | None = None) -> None:
    if folder is not None:
        print(write(files.load(), folder))
        return
    with tempfile.TemporaryDirectory() as place:
        path = write(files.toy(), place)
        print(*sorted(p.name for p in path.iterdir()))


if __name__ == "__main__":
    main(*sys.argv[1:2])
