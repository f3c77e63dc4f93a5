"""`Quantize.fit`: methods against NumPy in float64, budgets, and that what it gives compiles."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from qgraph.errors import InputError, QuantizationError
from qgraph.fitting.attention import attention, gradients
from qgraph.fitting.backward import backward
from qgraph.fitting.budget import cheapest
from qgraph.fitting.formats import FORMATS, Format, as_numpy, packed
from qgraph.fitting.gptq import damped, error, factor, gptq, nearest, refined, root
from qgraph.fitting.walk import Walk, live_ranges
from qgraph.fitting.weights import prepared
from qgraph.quantization.fitted import Fitted

RNG = np.random.default_rng(0)


def layer(rows: int = 24, columns: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the Hessian of inputs whose columns hang together."""
    w = RNG.normal(size=(rows, columns)).astype(np.float32)
    mixing = RNG.normal(size=(columns, columns)) * RNG.uniform(0.1, 1, columns)
    x = RNG.normal(size=(1000, columns)) @ mixing
    return w, damped(x.T @ x / 1000)


class Model(nn.Module):
    """An embedding that is the head as well, and two products after a norm between."""

    def __init__(self, width: int = 64, vocab: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.norm = nn.RMSNorm(width)
        self.norm.weight = mx.exp(1.5 * mx.random.normal((width,), key=mx.random.key(9)))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def __call__(self, ids: mx.array) -> mx.array:
        h = self.embed(ids)
        h = h + self.down(nn.silu(self.up(self.norm(h))))
        return self.embed.as_linear(h)


@pytest.fixture
def model() -> Model:
    mx.random.seed(3)
    return Model()


def data(count: int = 6) -> list[mx.array]:
    return [mx.random.randint(0, 96, (2, 16), key=mx.random.key(i)) for i in range(count)]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packed_weights_are_the_numbers_of_the_grid(form: Format) -> None:
    w, h = layer()
    rounded = refined(w, h, gptq(w, factor(h), form, mx.float32), mx.float32)
    parts = packed(rounded.places, rounded.scales, rounded.biases, form, mx.float32)
    dense = mx.dequantize(*parts, **form.settings, dtype=mx.float32)
    np.testing.assert_allclose(np.array(dense), rounded.values(), rtol=1e-6, atol=1e-6)
    assert sum(p.nbytes for p in parts if p is not None) == form.bytes(w.shape, 4)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_plain_rounding_is_mlx_s(form: Format) -> None:
    w, _ = layer()
    rounded = nearest(w, form, mx.float32)
    dense = mx.dequantize(*mx.quantize(mx.array(w), **form.settings), **form.settings,
                          dtype=mx.float32)  # fmt: skip
    np.testing.assert_allclose(rounded.values(), np.array(dense), rtol=1e-5, atol=1e-5)


def in_float64(w: np.ndarray, h: np.ndarray, form: Format) -> np.ndarray:
    """GPTQ as in the paper's algorithm 1 with blocks of one column, on the plain grid of a group
    as it is when its first column is reached: after each, all later columns take the update."""
    w = w.astype(np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    for j in range(w.shape[1]):
        if j % form.group_size == 0:
            group = mx.array(w[:, j : j + form.group_size].astype(np.float32))
            _, scales, biases = (np.array(p) for p in mx.quantize(group, **form.settings))
        code = np.clip(np.rint((w[:, j : j + 1] - biases) / scales), 0, form.levels)
        value = code * scales + biases
        away = (w[:, j : j + 1] - value) / upper[j, j]
        w[:, j:] -= away * upper[j : j + 1, j:]
        w[:, j : j + 1] = value
    return w


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_the_paper_s(bits: int) -> None:
    w, h = layer(8)
    form = Format("affine", bits, 32)
    found = gptq(w, factor(h), form, mx.float32, search=False)
    wanted = in_float64(w, h, form)
    away = np.abs(found.values() - wanted)
    # A number that lies in the middle may fall to either side, and later ones then make up for it.
    assert np.mean(away < 1e-3 * np.abs(wanted).max()) > 0.97
    least = ((wanted - w) @ h * (wanted - w)).sum()
    assert error(w, h, found).sum() < 1.02 * least


@pytest.mark.parametrize("form", [f for f in FORMATS if f.group_size != 128], ids=str)
def test_each_step_lowers_the_error_of_the_product(form: Format) -> None:
    w, h = layer()
    importance = np.diag(h).astype(np.float32)

    def weighted(rounded: Any) -> float:
        return float((importance * (rounded.values() - w) ** 2).sum())

    plain = nearest(w, form, mx.float16)
    searched = nearest(w, form, mx.float16, importance)
    assert weighted(searched) <= weighted(plain)
    made_up = gptq(w, factor(h), form, mx.float16)
    best = refined(w, h, made_up, mx.float16)
    assert error(w, h, made_up).sum() < error(w, h, plain).sum()
    assert (error(w, h, best) <= error(w, h, made_up) * (1 + 1e-5)).all()


def test_scales_are_those_of_least_squares() -> None:
    from qgraph.fitting.gptq import _scales_again

    w, h = layer(4, 64)
    rounded = nearest(w, Format("affine", 3, 32), mx.float32)
    found = _scales_again(w, h, rounded, mx.float32)
    for row in range(4):
        codes = rounded.places[row].astype(np.float64)
        design = np.zeros((64, 4))
        for g in range(2):
            own = slice(32 * g, 32 * g + 32)
            design[own, g], design[own, 2 + g] = codes[own], 1
        best = np.linalg.solve(design.T @ h @ design, design.T @ h @ w[row])
        away = design @ best - w[row]
        least = away @ h @ away
        now = float(error(w[row : row + 1], h, _row(found, row)).sum())
        assert now == pytest.approx(least, rel=0.02)


def _row(rounded: Any, row: int) -> Any:
    pick = slice(row, row + 1)
    parts = (rounded.places[pick], rounded.scales[pick], rounded.biases[pick])
    return type(rounded)(rounded.form, *parts)


@pytest.mark.parametrize(
    "form", [Format("affine", 3, 64), Format("mxfp4", 4, 32), Format("nvfp4", 4, 16)], ids=str
)
def test_on_arrays_of_mlx_it_is_the_same(form: Format) -> None:
    """As it runs on a GPU."""
    w, h = layer()
    both = []
    for array in (np.array, mx.array):
        here, upper, near = (array(a.astype(np.float32)) for a in (w, factor(h), h))
        found = refined(here, near, gptq(here, upper, form, mx.float16), mx.float16)
        both.append(found.in_numpy())
    on_numpy, on_mlx = both
    assert np.mean(on_numpy.places != on_mlx.places) < 0.02  # what lies in the middle may differ
    assert error(w, h, on_mlx).sum() == pytest.approx(error(w, h, on_numpy).sum(), rel=0.02)


def test_the_root_and_the_factor_of_the_inverse() -> None:
    _, h = layer(1, 64)
    upper, r = factor(h), root(h)
    np.testing.assert_allclose(r @ r.T, h, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(upper.T @ upper @ h, np.eye(64), atol=1e-3)
    assert (np.tril(upper, -1) == 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_the_knapsack_is_exact(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = (random.integers(1, 9, (5, 4)) * 8).tolist()
    costs = random.uniform(0, 1, (5, 4)).tolist()
    budget = int(random.integers(60, 200))
    fitting = [
        sum(c[i] for c, i in zip(costs, picks, strict=True))
        for picks in itertools.product(range(4), repeat=5)
        if sum(s[i] for s, i in zip(sizes, picks, strict=True)) <= budget
    ]
    found = cheapest(sizes, costs, budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert sum(s[i] for s, i in zip(sizes, found, strict=True)) <= budget
    assert sum(c[i] for c, i in zip(costs, found, strict=True)) == pytest.approx(min(fitting))


@pytest.mark.parametrize("mask", [None, "causal", "bool", "added"])
def test_attention_on_the_host_and_its_gradients_are_mlx_s(mask: str | None) -> None:
    keys = [mx.random.key(i) for i in range(5)]
    q = mx.random.normal((2, 4, 5, 8), key=keys[0])
    k, v = (mx.random.normal((2, 2, 7, 8), key=key) for key in keys[1:3])
    given: Any = mask
    if mask == "bool":
        given = mx.random.uniform(shape=(2, 1, 5, 7), key=keys[3]) < 0.8
    elif mask == "added":
        given = mx.random.normal((5, 7), key=keys[3])

    def own(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return [mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=given)]

    up = mx.random.normal((2, 4, 5, 8), key=keys[4])
    (y,), wanted = mx.vjp(own, [q, k, v], [up])
    assert mx.allclose(attention(q, k, v, 0.3, given), y, atol=1e-5)
    for found, one in zip(gradients(q, k, v, 0.3, given, up), wanted, strict=True):
        assert mx.allclose(found, one, atol=1e-5)


def looped(w: mx.array, stack: mx.array) -> Any:
    """One weight at every turn, and one of a stack at each."""

    def turn(i: Any, h: Any) -> Any:
        return qg.tanh(h @ w.T)

    def layer(h: Any, one: Any) -> Any:
        h = h + qg.tanh(h @ one.swapaxes(-1, -2))
        return h, h.sum()

    return lambda x: qg.scan(layer, qg.fori_loop(0, 3, turn, x), stack)[0]


def test_gradients_at_products_are_mlx_s(model: Model) -> None:
    ids = data(1)[0]
    found = prepared(qg.from_mlx(model, ids), qg.Quantize(bits=8, group_size=32))
    up = mx.random.normal((2, 16, 96))
    sums: dict[str, np.ndarray] = {}

    def heard(use: Any, gradient: mx.array) -> None:
        if use.x is not None and "embed" not in use.handle.name:
            rows = as_numpy(gradient).reshape(-1, gradient.shape[-1])
            sums[use.handle.name] = rows.T @ as_numpy(use.x).reshape(len(rows), -1)

    backward(Walk(found), [ids], lambda _: up, heard)
    wanted = nn.value_and_grad(model, lambda m: (m(ids) * up).sum())(model)[1]
    assert set(sums) == {"up.weight", "down.weight"}
    for name, got in sums.items():
        np.testing.assert_allclose(got, np.array(wanted[name[:-7]]["weight"]), atol=1e-4)


def test_a_backward_pass_runs_a_layer_again_and_no_more() -> None:
    """What lives at cuts between layers is all that is kept of the forward pass."""
    from qgraph.fitting.backward import _cuts

    layers = [(nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)) for _ in range(6)]

    def fn(x: mx.array) -> mx.array:
        for norm, up, down in layers:
            x = x + down(nn.silu(up(norm(x))))
        return x

    graph = prepared(qg.from_mlx(fn, mx.ones((1, 8, 32))), qg.Quantize(bits=8, group_size=32)).graph
    constants = {i for i, n in enumerate(graph.nodes) if n.op in ("constant", "quantize")}
    runs = [len({*range(*cut)} - constants) for cut in _cuts(graph, live_ranges(graph))]
    assert max(runs) <= sum(runs) / len(layers)


def test_gradients_and_inputs_in_loops() -> None:
    """Each turn's, for a weight that all share and for a stack's."""
    w, stack = (mx.random.normal(s, key=mx.random.key(1)) / 8 for s in ((64, 64), (2, 64, 64)))
    x = mx.random.normal((4, 64), key=mx.random.key(2))
    graph = qg.trace(looped(w, stack), x)
    found = prepared(graph, qg.Quantize(bits=8, group_size=32))
    assert {name: weight.inside for name, weight in found.weights.items()} == {
        "w": True, "stack": True
    }  # fmt: skip
    up = mx.random.normal((4, 64), key=mx.random.key(3))
    sums: dict[Any, Any] = {}

    def heard(use: Any, gradient: mx.array) -> None:
        key = use.handle.name, use.handle.index
        sums[key] = sums.get(key, 0) + np.array(gradient).T @ np.array(use.x)

    backward(Walk(found), [x], lambda _: up, heard)

    def loss(w: mx.array, stack: mx.array) -> mx.array:
        h = x
        for _ in range(3):
            h = mx.tanh(h @ w.T)
        for i in range(2):
            h = h + mx.tanh(h @ stack[i].T)
        return (h * up).sum()

    at_w, at_stack = (np.array(g) for g in mx.grad(loss, argnums=(0, 1))(w, stack))
    np.testing.assert_allclose(sums["w", ()], at_w, atol=1e-5)
    for i in range(2):
        np.testing.assert_allclose(sums["stack", (i,)], at_stack[i], atol=1e-5)
    config = qg.Quantize.fit(graph, [x, x + 1], bits=6)
    assert config.fitted is not None
    assert {n: one.shape for n, one in config.fitted.items()} == {
        "w": (64, 64), "stack": (2, 64, 64)
    }  # fmt: skip
    near = qg.compile(graph, quantize=config)(x)
    assert mx.abs(near - qg.compile(graph)(x)).max() < 0.2


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


def test_better_methods_come_nearer(model: Model) -> None:
    ids = data(8)

    def away(*methods: str) -> float:
        config = qg.Quantize.fit(model, ids, bits=4, methods=methods, formats=[{"bits": 3}])
        program = qg.compile(model, ids[0], quantize=config)
        return float(sum(((program(x) - model(x)) ** 2).mean() for x in ids))

    plain, best = away(), away("scales", "gptq")
    assert away("scales") < plain
    assert best < 0.7 * plain


def test_an_edited_rule_counts_and_the_ledger_says_so(model: Model) -> None:
    from dataclasses import replace

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


def test_a_fit_goes_on_where_it_was_broken_off(model: Model, tmp_path: Path) -> None:
    first = qg.Quantize.fit(model, data(), bits=5, folder=tmp_path)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    gone = next(iter(written))
    gone.unlink()
    second = qg.Quantize.fit(model, data(), bits=5, folder=tmp_path)
    assert {p for p in tmp_path.iterdir() if p.stat().st_mtime_ns == written[p]} == set(written) - {
        gone
    }
    assert first.fitted is not None
    assert second.fitted is not None
    for name, one in first.fitted.items():
        assert isinstance(one, Fitted)
        assert mx.array_equal(one.weight, second.fitted[name].weight)


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


ALL = ("scales", "gptq", "sensitivity")
SCALED = ("awq", "gptq", "sensitivity")


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


def test_what_is_kept_on_disk_knows_one_fit_from_another() -> None:
    """Two with the same rules and other numbers; programs of one are none of the other."""
    from dataclasses import replace

    mx.random.seed(3)
    first = qg.Quantize.fit(Model(), data(2), bits=5.5, methods=("scales",))
    assert first.fitted is not None
    name, one = next(iter(first.fitted.items()))
    other = replace(first, fitted={**first.fitted, name: replace(one, scales=one.scales * 2)})
    assert repr(other) == repr(first)
    assert other.digest() != first.digest()
    assert replace(first).digest() == first.digest()


def test_factors_of_another_graph_do_not_count(model: Model) -> None:
    """Where a fold cannot be proven, weights are rounded as they are: the function is the same."""
    config = qg.Quantize.fit(model, data(), bits=6, methods=("awq", "gptq"), formats=[{"bits": 5}])
    assert config.folded is not None

    class Other(Model):
        def __call__(self, ids: mx.array) -> mx.array:
            return super().__call__(ids) + self.norm(self.embed(ids)).sum()

    other = Other()
    other.update(model.parameters())
    program = qg.compile(other, data(1)[0], quantize=config)
    said = [str(e) for e in program.plan.ledger()]
    assert any("its factors stay where they are: sum does not commute" in line for line in said)
    assert any("up.weight" in line and "for other numbers" in line for line in said)


def test_what_is_fitted_before_sees_inputs_as_factors_leave_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A weight that two products read is fitted on what the float graph gave it."""
    from qgraph.fitting.job import Job

    norm = mx.exp(1.5 * mx.random.normal((64,), key=mx.random.key(9)))
    up, once = (mx.random.normal((64, 64), key=mx.random.key(i)) / 8 for i in (1, 4))

    def fn(x: Any) -> Any:
        y = qg.fast.rms_norm(x, norm, 1e-5)
        return (y @ once.T + y @ up.T).sum(axis=0) + qg.tanh(y[:4] @ up.T).sum(axis=0)

    x = mx.random.normal((256, 64), key=mx.random.key(2))
    seen: dict[str, np.ndarray] = {}
    plain = Job._fit

    def fit(self: Job, weight: Any, hessian: Any) -> None:
        seen[weight.name] = hessian((weight.name, ()))
        plain(self, weight, hessian)

    monkeypatch.setattr(Job, "_fit", fit)
    config = qg.Quantize.fit(
        qg.trace(fn, x), [x], bits=4, methods=("awq", "gptq"), formats=[{"bits": 3}]
    )
    assert config.folded is not None
    rows = np.array(x, np.float64)
    y = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5)
    y = y * np.array(norm) / np.array(config.folded["norm"])
    y = np.concatenate([y, y[:4]])
    np.testing.assert_allclose(seen["up"], y.T @ y / len(y), rtol=1e-3, atol=1e-3)


class Experts(nn.Module):
    """Each row goes to one of four experts, whose inputs differ."""

    def __init__(self) -> None:
        super().__init__()
        self.up = mx.random.normal((4, 64, 64), key=mx.random.key(1)) / 8

    def __call__(self, x: mx.array, expert: mx.array) -> mx.array:
        rows = mx.expand_dims(x, -2)
        return mx.gather_mm(rows, self.up.swapaxes(-1, -2), rhs_indices=expert).squeeze(-2)


def experts() -> tuple[Experts, list[tuple[mx.array, mx.array]]]:
    """Each expert's inputs lie mostly in columns of its own; the last gets no row."""
    batches = []
    for i in range(4):
        expert = mx.random.randint(0, 3, (48,), key=mx.random.key(i))
        own = mx.arange(64)[None] // 16 == expert[:, None]
        x = mx.random.normal((48, 64), key=mx.random.key(10 + i)) * mx.where(own, 4.0, 0.1)
        batches.append((x, expert))
    return Experts(), batches


def test_experts_have_hessians_of_their_own() -> None:
    from qgraph.fitting.statistics import Statistics

    model, batches = experts()
    graph = qg.from_mlx(model, *batches[0])
    found = prepared(graph, qg.Quantize(bits=8, group_size=32))
    (weight,) = found.weights.values()
    statistics = Statistics(found, full=True)
    uses: list[Any] = []
    for x, expert in batches:
        walk = Walk(found, listener=uses.append)
        env = walk.start([x, expert])
        for node in found.graph.nodes:
            walk.run(node, env)
    hessian = statistics.of(weight, uses)
    x, expert = (np.concatenate([np.array(b[i], np.float64) for b in batches]) for i in range(2))
    alone = [x[expert == e] for e in range(3)]
    each = [rows.T @ rows / len(rows) for rows in alone]
    everything = sum(each) / 3
    for e, rows in enumerate(alone):
        wanted = (len(rows) * each[e] + 16 * everything) / (len(rows) + 16)
        np.testing.assert_allclose(hessian((weight.name, (e,))), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(hessian((weight.name, (3,))), everything, rtol=1e-4, atol=1e-4)


def test_experts_fitted_each_on_its_rows_come_nearer() -> None:
    model, batches = experts()
    x, expert = batches[0]

    def away(*methods: str) -> float:
        config = qg.Quantize.fit(
            model,
            batches,
            bits=4,
            methods=methods,
            scales=mx.float16,
            formats=[{"bits": 3, "group_size": 32}],
        )
        program = qg.compile(model, x, expert, quantize=config)
        return float(((program(x, expert) - model(x, expert)) ** 2).mean())

    plain, compensated = away(), away("gptq")
    assert compensated < 0.9 * plain
    assert away("scales", "gptq", "sensitivity") < 0.8 * compensated
