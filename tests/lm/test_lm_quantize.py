"""`qgraph quantize`: a folder of floats becomes one that mlx-lm loads, with the fit's numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from qgraph.cli import app
from qgraph.examples import checkpoint
from qgraph.examples import smollm2_files as files

pytest.importorskip("mlx_lm.models.cache")
pytest.importorskip("transformers")

CONFIG = replace(files.TOY_CONFIG, heads=2, kv_heads=1, head_dim=32)
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    """A toy in a folder as mlx-lm writes one, its weights floats."""
    toy = files.Model(CONFIG, files.toy_weights(CONFIG), files.ByteTokenizer())
    folder = checkpoint.write(toy, tmp_path / "floats", mx.float32)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    for name in [n[:-7] for n in weights if n.endswith(".scales")]:
        parts = [weights.pop(f"{name}.{part}") for part in ("weight", "scales", "biases")]
        bits = 8 if "embed" in name else 4
        weights[f"{name}.weight"] = mx.dequantize(*parts, group_size=CONFIG.group_size, bits=bits)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


def _run(floats: Path, *more: str) -> Any:
    data, out = floats.parent / "text.txt", floats.parent / "packed"
    given = ["quantize", "--model", str(floats), "--data", str(data), "--out", str(out)]
    return CliRunner().invoke(app, [*given, "--length", "64", *more])


def test_the_folder_is_mlx_lms_and_holds_the_fit(floats: Path) -> None:
    import mlx_lm

    done = _run(floats, "--bits", "5", "--pieces", "3")
    assert done.exit_code == 0, done.output
    folder = floats.parent / "packed"
    model, tokenizer = mlx_lm.load(str(folder))
    kinds = {type(m) for _, m in model.named_modules() if "scales" in m}
    assert kinds == {nn.QuantizedLinear, nn.QuantizedEmbedding}  # type: ignore[attr-defined]
    said = json.loads((folder / "config.json").read_text())["quantization"]
    layers = {path: m for path, m in model.named_modules() if "scales" in m}
    assert {p: (m.bits, m.group_size, m.mode) for p, m in layers.items()} == {
        p: (s["bits"], s["group_size"], s["mode"]) for p, s in said.items() if isinstance(s, dict)
    }
    size = sum(m[part].nbytes for m in layers.values() for part in ("weight", "scales", "biases")
               if m.get(part) is not None)  # fmt: skip
    before, _ = mlx_lm.load(str(floats))
    count = sum(dict(before.named_modules())[path].weight.size for path in layers)
    assert size <= count * 5 / 8

    # What the command said of both is what mlx-lm's own models give.
    tokens = tokenizer.encode(TEXT)
    last = mx.array([tokens[len(tokens) // 4 * 3 :][:64]])
    expected = [_perplexity(m, last) for m in (before, model)]
    page = (folder / "quantization.md").read_text()
    said_of_both = re.search(r"perplexity ([\d.]+) before, ([\d.]+) after", done.output)
    assert said_of_both is not None
    figures = [float(figure) for figure in said_of_both.groups()]
    np.testing.assert_allclose(figures, expected, rtol=2e-3)
    assert f"{figures[0]:.3f} as it was, {figures[1]:.3f} as it is" in page
    assert all(f"| {path}.weight |" in page for path in layers)
    assert (folder / "quantization.svg").read_text().count("<path") > 3
    assert not (folder / "unfinished").exists()


def test_weights_of_norms_are_scaled_too(floats: Path) -> None:
    """mlx-lm's model of the folder is what the program with the fit's factors is."""
    import mlx_lm

    weights: Any = mx.load(str(floats / "model.safetensors"))
    for name in [n for n in weights if "layernorm" in n]:
        weights[name] = mx.exp(1.5 * mx.random.normal(weights[name].shape, key=mx.random.key(3)))
    mx.save_safetensors(str(floats / "model.safetensors"), weights, metadata={"format": "mlx"})
    done = _run(floats, "--bits", "5", "--pieces", "2", "--methods", "awq")
    assert done.exit_code == 0, done.output
    model, tokenizer = mlx_lm.load(str(floats.parent / "packed"))
    norms = {n: a for n, a in tree_flatten(model.parameters()) if "layernorm" in n}
    assert any(not mx.allclose(norm, weights[name]) for name, norm in norms.items())
    tokens = tokenizer.encode(TEXT)
    last = mx.array([tokens[len(tokens) // 3 * 2 :][:64]])
    said = re.search(r"([\d.]+) after", done.output)
    assert said is not None
    np.testing.assert_allclose(float(said[1]), _perplexity(model, last), rtol=2e-3)


def _perplexity(model: Any, tokens: mx.array) -> float:
    logits = np.array(model(tokens)[0, :-1].astype(mx.float32), np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = log[np.arange(len(log)), np.array(tokens[0, 1:])]
    return math.exp(-picked.mean())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--bits", "5", "--length", "4096"), "make 0 pieces of 4096"),
        (("--bits", "0.5"), "too few"),
        ((), "give one of --bits and --bytes"),
        (("--bits", "5", "--methods", "magic"), "magic"),
    ],
)
def test_what_cannot_be_fitted_is_said(floats: Path, more: tuple[str, ...], words: str) -> None:
    done = _run(floats, *more)
    assert done.exit_code != 0
    assert words in str(done.exception) + done.output


def test_a_packed_model_is_refused(floats: Path) -> None:
    toy = files.Model(CONFIG, files.toy_weights(CONFIG), files.ByteTokenizer())
    checkpoint.write(toy, floats, mx.float32)
    done = _run(floats, "--bits", "5")
    assert "is packed already" in str(done.exception) + done.output
