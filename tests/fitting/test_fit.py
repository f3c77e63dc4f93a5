"""`Quantize.fit`: what it gives, edits of it, going on where it was, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg
from qgraph.errors import InputError, QuantizationError
from qgraph.fitting.statistics.gathered import Statistics
from tests.support.fitting import Model, data


def test_better_methods_come_nearer(model: Model) -> None:
    ids = data(8)

    def away(*methods: str) -> float:
        config = qg.Quantize.fit(model, ids, bits=4, methods=methods, formats=[{"bits": 3}])
        program = qg.compile(model, ids[0], quantize=config)
        return float(sum(((program(x) - model(x)) ** 2).mean() for x in ids))

    plain, best = away(), away("scales", "gptq")
    assert away("scales") < plain
    assert best < 0.7 * plain


@pytest.mark.parametrize(("bits", "wanted"), [(3.4, (3, 128)), (3.5, (3, 64)), (4.4, (3, 32))])
def test_without_sensitivity_all_have_the_best_format_that_fits(
    bits: float, wanted: tuple[int, int]
) -> None:
    layer = nn.Linear(128, 128)
    formats = [{"bits": b, "group_size": size} for b in (2, 3, 4) for size in (32, 64, 128)]
    config = qg.Quantize.fit(
        layer, [mx.ones((4, 128))], bits=bits, methods=("scales",), formats=formats[:-1],
        scales=mx.float16,
    )  # fmt: skip
    assert config.fitted is not None
    (one,) = config.fitted.values()
    assert (one.bits, one.group_size) == wanted


def test_an_edited_rule_counts_and_the_ledger_says_so(model: Model) -> None:
    config = qg.Quantize.fit(model, data(2), bits=5.5)
    assert isinstance(config.where, dict)
    edited = replace(config, where={**config.where, "up.weight": {"bits": 8, "group_size": 32}})
    plan = qg.compile(model, data(1)[0], quantize=edited).plan
    (note,) = [
        str(e.reason) for e in plan.ledger() if e.name == "up.weight" and "8 bits" in e.reason
    ]
    assert "rounded, as its fit was for" in note


def test_numbers_of_another_weight_do_not_count(model: Model) -> None:
    config = qg.Quantize.fit(model, data(2), bits=5.5)
    model.up.weight = model.up.weight + 1
    plan = qg.compile(model, data(1)[0], quantize=config).plan
    notes = [str(e.reason) for e in plan.ledger() if e.name == "up.weight"]
    assert any("for other numbers" in note for note in notes)


def test_what_is_kept_on_disk_knows_one_fit_from_another() -> None:
    """Two with the same rules and other numbers; programs of one are none of the other."""
    mx.random.seed(3)
    first = qg.Quantize.fit(Model(), data(2), bits=5.5, methods=("scales",))
    assert first.fitted is not None
    name, one = next(iter(first.fitted.items()))
    other = replace(first, fitted={**first.fitted, name: replace(one, scales=one.scales * 2)})
    assert repr(other) == repr(first)
    assert other.digest() != first.digest()
    assert replace(first).digest() == first.digest()


def same(one: qg.Quantize, other: qg.Quantize) -> bool:
    return one == other and one.digest() == other.digest()


@pytest.mark.parametrize("methods", [("scales", "gptq", "sensitivity"), ("awq", "gptq")])
def test_a_fit_goes_on_where_it_was_broken_off(
    model: Model, tmp_path: Path, methods: tuple[str, ...]
) -> None:
    options: dict[str, Any] = {"bits": 5, "methods": methods, "folder": tmp_path}
    first = qg.Quantize.fit(model, data(), **options)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    gone = next(p for p in written if p.suffix == ".safetensors")
    gone.unlink()
    second = qg.Quantize.fit(model, data(), **options)
    assert {p for p in written if p.stat().st_mtime_ns == written[p]} == set(written) - {gone}
    assert same(first, second)


def test_what_was_learned_serves_another_budget(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = qg.Quantize.fit(model, data(), bits=6)
    qg.Quantize.fit(model, data(), bits=5, folder=tmp_path)
    monkeypatch.setattr(Statistics, "listen", None)
    assert same(alone, qg.Quantize.fit(model, data(), bits=6, folder=tmp_path))


@pytest.mark.parametrize(
    "other",
    [{"methods": ("gptq",)}, {"scales": mx.float16}, {"result": "logits"}, {"data": data(3)}],
    ids=str,
)
def test_a_folder_of_another_fit_is_not_gone_on_with(
    model: Model, tmp_path: Path, other: dict[str, Any]
) -> None:
    given = {"data": data(4), "bits": 5, "methods": ("scales", "gptq")}
    qg.Quantize.fit(model, **given, folder=tmp_path)
    found = qg.Quantize.fit(model, **(given | other), folder=tmp_path)
    assert same(found, qg.Quantize.fit(model, **(given | other)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1.0}, "too few"),
        ({}, "either bits"),
        ({"bits": 4, "methods": ("magic",)}, "magic"),
        ({"bits": 4, "result": "text"}, "result='text'"),
        ({"bits": 4, "data": []}, "data is empty"),
        ({"bits": 4, "data": [mx.zeros((2, 16), mx.int32), mx.zeros((1, 16), mx.int32)]}, "item 1"),
    ],
)
def test_what_cannot_be_fitted_is_said(model: Model, options: dict[str, Any], words: str) -> None:
    given = {"data": data(2), **options}
    with pytest.raises(InputError, match=words):
        qg.Quantize.fit(model, **given)


def test_a_function_as_rule_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="is a function"):
        qg.Quantize(where=lambda name, shape: True).save(tmp_path / "q.safetensors")
