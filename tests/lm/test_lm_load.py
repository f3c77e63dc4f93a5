"""Checkpoints that GPTQ packed, through `qg.lm.load`: the numbers of their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from qgraph.errors import QuantizationError
from qgraph.examples import checkpoint
from qgraph.examples import smollm2_files as files
from tests.support.packed_files import Gptq

llama: Any = pytest.importorskip("mlx_lm.models.llama")
cache: Any = pytest.importorskip("mlx_lm.models.cache")
pytest.importorskip("transformers")

CONFIG = replace(files.TOY_CONFIG, heads=2, kv_heads=1, head_dim=32)
TOKENS = mx.array([[(13 * i + 5) % 200 + 1 for i in range(9)]])


def _folder(path: Path, scattered: bool = False, **said: Any) -> tuple[Path, dict[str, mx.array]]:
    """A toy whose products GPTQ packed, in float32 otherwise, and its weights as floats."""
    toy = files.Model(CONFIG, files.toy_weights(CONFIG), files.ByteTokenizer())
    checkpoint.write(toy, path, mx.float32)
    weights = mx.load(str(path / "model.safetensors"))
    config = json.loads((path / "config.json").read_text())
    del config["quantization"]
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, **said}
    dense: dict[str, Any] = {}
    for name in [n[:-7] for n in weights if n.endswith(".scales")]:
        parts = {p: weights.pop(f"{name}.{p}") for p in ("weight", "scales", "biases")}
        bits = 8 if "embed" in name else 4
        float_weight = mx.dequantize(*parts.values(), group_size=CONFIG.group_size, bits=bits)
        if "embed" in name:  # GPTQ leaves it
            weights[f"{name}.weight"] = dense[f"{name}.weight"] = float_weight
            continue
        packed = Gptq(4, 32, scattered=scattered, shape=float_weight.shape)
        weights |= {f"{name}.{part}": array for part, array in packed.arrays.items()}
        dense[f"{name}.weight"] = mx.array(packed.dense.astype(np.float32))
    dense |= {n: a for n, a in weights.items() if n.endswith("norm.weight")}
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path, dense


@pytest.mark.parametrize("scattered", [False, True])
def test_a_checkpoint_of_gptq_gives_the_numbers_of_its_file(
    tmp_path: Path, scattered: bool
) -> None:
    mx.set_default_device(mx.cpu)
    folder, dense = _folder(tmp_path, scattered)
    model, tokenizer = qg.lm.load(folder)
    assert type(model).__module__ == "mlx_lm.models.llama"
    assert tokenizer.decode(tokenizer.encode("as it is")) == "as it is"
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, nn.QuantizedLinear)
    assert ("order" in layer) == scattered
    config = json.loads((folder / "config.json").read_text())
    reference = llama.Model(llama.ModelArgs.from_dict(config))
    reference.load_weights(list(dense.items()))
    expected = reference(TOKENS)
    np.testing.assert_allclose(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    fast = qg.lm.accelerate(model, target="cpu", background=False, keep=False)
    kept = cache.make_prompt_cache(fast)
    np.testing.assert_allclose(fast(TOKENS, cache=kept), expected, rtol=1e-4, atol=1e-4)
    assert fast.qgraph.programs
    assert not fast.qgraph.eager


def test_other_folders_are_mlx_lms(tmp_path: Path) -> None:
    toy = files.Model(CONFIG, files.toy_weights(CONFIG), files.ByteTokenizer())
    checkpoint.write(toy, tmp_path, mx.float32)
    model, _, config = qg.lm.load(tmp_path, return_config=True)
    assert type(model.model.layers[0].mlp.up_proj) is nn.QuantizedLinear
    assert config["model_type"] == "llama"


def test_other_packings_are_refused(tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path, quant_method="awq", version="gemv")
    with pytest.raises(QuantizationError, match="gemv"):
        qg.lm.load(folder)
