"""What was fitted is what runs: compiled, saved, exported, sharded, and under mlx-lm's loop."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

import qgraph as qg
from tests.support.fitting import Model, data

ALL = ("scales", "gptq", "sensitivity")


SCALED = ("awq", "gptq", "sensitivity")


FITS = [(), ("scales",), ("gptq",), ("awq", "gptq"), ("scales", "gptq", "sensitivity"),
        ("awq", "gptq", "sensitivity")]  # fmt: skip


@pytest.mark.parametrize("methods", FITS)
def test_a_budget_is_kept_and_what_was_fitted_is_what_runs(
    model: Model, methods: tuple[str, ...], tmp_path: Path
) -> None:
    total = 64 * (96 + 128 + 128)
    config = qg.Quantize.fit(model, data(), bits=6, methods=methods, result="logits")
    chosen = {name: config.answer(name, (64, 64)) for name in ("embed.weight", "up.weight")}
    assert all(chosen.values())
    ids = data(1)[0]
    program = qg.compile(model, ids, quantize=config)
    if not methods:
        assert config.fitted is None
        return
    assert config.fitted is not None
    assert sum(one.nbytes for one in config.fitted.values()) <= total * 6 / 8
    notes = [e.reason for e in program.plan.ledger() if e.decision == "chosen"]
    assert sum("numbers by" in str(note) for note in notes) == 3
    assert (config.folded is not None) == ("awq" in methods)
    dense = Model()
    dense.update(model.parameters())
    dense.load_weights([(n, one.dense()) for n, one in config.fitted.items()], strict=False)
    for name, factors in (config.folded or {}).items():
        assert name == "norm.weight"
        dense.norm.weight = dense.norm.weight / factors
    assert mx.allclose(program(ids), dense(ids), atol=1e-4)

    again = qg.Quantize.load(config.save(tmp_path / "fitted.safetensors"))
    assert again == config
    assert again.digest() == config.digest()
    assert mx.array_equal(qg.compile(model, ids, quantize=again)(ids), program(ids))
    loaded = qg.load(program.save(tmp_path / "program"))
    assert mx.array_equal(loaded(ids), program(ids))


@pytest.mark.parametrize("methods", [ALL, SCALED])
def test_what_was_fitted_is_what_is_sharded_and_exported(
    model: Model, tmp_path: Path, methods: tuple[str, ...]
) -> None:
    config = qg.Quantize.fit(model, data(), bits=5.5, result="logits", methods=methods)
    assert (config.folded is not None) == ("awq" in methods)
    ids = data(1)[0]
    wanted = qg.compile(model, ids, quantize=config)(ids)
    spread = qg.compile(model, ids, quantize=config, mesh=qg.Mesh(2))
    assert mx.allclose(spread(ids), wanted, atol=1e-4)
    path = qg.compile(model, ids, quantize=config).export(tmp_path / "model.mlxfn")
    (exported,) = mx.import_function(str(path))(ids)
    assert mx.allclose(exported, wanted, atol=1e-4)


@pytest.mark.parametrize("methods", [ALL, SCALED])
def test_what_was_fitted_is_what_an_accelerated_model_gives(methods: tuple[str, ...]) -> None:
    pytest.importorskip("mlx_lm")
    from qgraph.examples import smollm2_files as files

    toy = files.toy()
    model = files.mlx_lm_model(files.dequantized(toy.weights), toy.config)
    for i, layer in enumerate(model.model.layers):
        spread = mx.exp(mx.random.normal((64,), key=mx.random.key(i)))
        layer.input_layernorm.weight = layer.post_attention_layernorm.weight = spread
    ids = [mx.random.randint(0, 256, (1, 16), key=mx.random.key(i)) for i in range(3)]
    config = qg.Quantize.fit(
        model, ids, bits=4, result="logits", methods=methods, formats=[{"bits": 3}]
    )
    assert (config.folded is not None) == ("awq" in methods)
    wanted = qg.compile(model, ids[0], quantize=config)(ids[0])
    from mlx_lm.models.cache import make_prompt_cache

    fast = qg.lm.accelerate(model, quantize=config, background=False, keep=False)
    given = fast(ids[0], cache=make_prompt_cache(fast))
    assert mx.allclose(given, wanted, atol=1e-3)
    # A token alone, on the cache that the prompt left: another program of the same model.
    cache = make_prompt_cache(fast)
    fast(ids[0][:, :-1], cache=cache)
    assert mx.allclose(fast(ids[0][:, -1:], cache=cache), wanted[:, -1:], atol=2e-3)
