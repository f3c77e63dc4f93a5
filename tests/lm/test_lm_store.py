"""Plans and packed weights on disk: the second start optimizes and packs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

import qgraph as qg
from qgraph.examples import smollm2_files as files

lm_cache: Any = pytest.importorskip("mlx_lm.models.cache")
PROMPT = mx.array([[5, 9, 200, 31]])


@pytest.fixture(autouse=True)
def _without_fusing() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def model() -> Any:
    found = files.mlx_lm_model(files.toy_weights(), files.TOY_CONFIG)
    found.set_dtype(mx.float32)
    return found


def logits(model: Any) -> mx.array:
    cache = lm_cache.make_prompt_cache(model)
    found = [model(tokens, cache=cache)[:, -1] for tokens in (PROMPT, *[PROMPT[:, :1]] * 3)]
    return mx.stack(found)


def accelerated(model: Any, folder: Path, **settings: Any) -> Any:
    return qg.lm.accelerate(model, target="cpu", background=False, keep=folder, **settings)


def nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("the second start does this again")


@pytest.mark.parametrize("settings", [{}, {"quantize": qg.Quantize(8, group_size=32)}], ids=str)
def test_a_second_start(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings:
        weights = files.dequantized(files.toy_weights())
        one, other = (files.mlx_lm_model(weights, files.TOY_CONFIG) for _ in range(2))
    else:
        one, other = model(), model()
    first = accelerated(one, tmp_path, **settings)
    expected = logits(first)
    assert not any(p.kept for p in first.qgraph.programs)
    monkeypatch.setattr("qgraph.lm.programs.maker.optimize", nothing)
    monkeypatch.setattr("qgraph.lm.programs.maker.from_mlx", nothing)
    monkeypatch.setattr("qgraph.runtime.packing.Interpreter", nothing)
    second = accelerated(other, tmp_path, **settings)
    assert mx.array_equal(logits(second), expected).item()
    assert len(second.qgraph.programs) == 2
    assert all(p.kept for p in second.qgraph.programs)
    assert "read in" in second.qgraph.report()


def test_other_weights_have_another_folder(tmp_path: Path) -> None:
    logits(accelerated(model(), tmp_path))
    other = model()
    other.update(tree_map(lambda a: a * 1.5 if a.ndim == 1 else a, other.parameters()))
    fast = accelerated(other, tmp_path)
    assert mx.allclose(logits(fast), logits(other), rtol=1e-4, atol=1e-4).item()
    assert not any(p.kept for p in fast.qgraph.programs)
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_files_are_made_again(tmp_path: Path) -> None:
    expected = logits(accelerated(model(), tmp_path))
    files_there = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files_there
    for path in files_there:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fast = accelerated(model(), tmp_path)
    assert mx.array_equal(logits(fast), expected).item()
    assert not fast.qgraph.eager


@pytest.mark.parametrize(("count", "waits"), [(16, True), (4, False)])
def test_what_is_kept_is_waited_for(count: int, waits: bool, tmp_path: Path) -> None:
    """From 9 tokens on; without the first start the model takes 16 itself."""
    prompt = mx.arange(count)[None]

    def first_call() -> Any:
        fast = qg.lm.accelerate(model(), target="cpu", keep=tmp_path)
        mx.eval(fast(prompt, cache=lm_cache.make_prompt_cache(fast)))
        return fast.qgraph

    assert not first_call().programs
    fast = accelerated(model(), tmp_path)
    mx.eval(fast(prompt, cache=lm_cache.make_prompt_cache(fast)))
    assert [p.kept for p in first_call().programs] == [True] * waits


@pytest.mark.parametrize(("dtype", "waits"), [(mx.bfloat16, True), (mx.float32, False)])
def test_half_precision_is_waited_for(dtype: mx.Dtype, waits: bool) -> None:
    half = model()
    half.set_dtype(dtype)
    fast = qg.lm.accelerate(half, target="cpu", keep=False)
    mx.eval(fast(mx.arange(16)[None], cache=lm_cache.make_prompt_cache(fast)))
    assert bool(fast.qgraph.programs) == waits
