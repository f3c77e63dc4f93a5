"""`quantize=`: the same as `mlx.nn.quantize`, and rules for what to quantize."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import qgraph as qg
from qgraph.errors import QuantizationError
from qgraph.passes import (
    EliminateDeadCode,
    FuseQuantizedMatmul,
    HoistQuantize,
    QuantizeWeights,
    SinkDequantize,
)
from tests.importer.test_import import SIZES

PLAIN = [SinkDequantize(), FuseQuantizedMatmul(), HoistQuantize(), EliminateDeadCode()]
"""What packs and fuses, and leaves each product to MLX."""

EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {"logits_scaling": 1.0, "attention_multiplier": 0.25, "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0, "attention_bias": False, "mlp_bias": False},
    "starcoder2": {"norm_epsilon": 1e-5},
}  # fmt: skip
MODELS = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "mixtral", "granite",
          "starcoder2"]  # fmt: skip
IDS = mx.array([[1, 7, 3, 99, 4]])


def model(name: str) -> Any:
    pytest.importorskip("mlx_lm")
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = {"model_type": name, **SIZES, **EXTRA.get(name, {})}
    mx.random.seed(3)
    lm = module.Model(module.ModelArgs.from_dict(config))
    lm.eval()
    mx.eval(lm.parameters())
    return lm


def packed_weights(program: qg.Program) -> dict[str, tuple[mx.array, ...]]:
    known = program.executables[0].known
    return {
        str(node.operand("w").node.args["name"]): tuple(known[v] for v in node.outputs)
        for node in program.plan.graph.nodes
        if node.op == "quantize"
    }


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_mlx_nn_quantize(name: str) -> None:
    """The same set of weights, the same bytes, the same outputs."""
    lm = model(name)
    graph = qg.from_mlx(lm, IDS)
    program = qg.compile(graph, target="cpu", quantize=qg.Quantize(4), passes=PLAIN)
    default = qg.compile(graph, target="cpu", quantize=qg.Quantize(4))
    nn.quantize(lm, group_size=64, bits=4)
    wanted = dict(tree_flatten(lm.parameters()))
    packed = packed_weights(program)
    assert set(packed) == {k for k, a in wanted.items() if a.dtype == mx.uint32}
    for path, (w, scales, biases) in packed.items():
        stem = path.removesuffix(".weight")
        assert mx.array_equal(w, wanted[path]).item()
        assert mx.array_equal(scales, wanted[f"{stem}.scales"]).item()
        assert mx.array_equal(biases, wanted[f"{stem}.biases"]).item()
    for tokens in (IDS, IDS[:, ::-1] + 0):
        expected = lm(tokens)
        assert mx.array_equal(program(tokens), expected).item()
        error = mx.abs(default(tokens) - expected).max() / mx.abs(expected).max()
        assert error.item() < 1e-4


W = {n: mx.random.normal(s, key=mx.random.key(i)) for i, (n, s) in enumerate(
    {"table": (50, 64), "up": (128, 64), "down": (64, 128), "odd": (64, 40)}.items())}  # fmt: skip
mx.eval(W)


def written(ids: Any) -> Any:
    h = qg.take(W["table"], ids, 0)
    h = qg.tanh(h @ qg.transpose(W["up"])) @ qg.transpose(W["down"])
    return (h @ W["odd"]) @ qg.transpose(W["odd"])


def quantized(config: qg.Quantize, fn: Any = written) -> tuple[dict[str, int], qg.Plan]:
    graph = qg.trace(fn, qg.spec((5,), mx.int32))
    plan = qg.optimize(graph, target="cpu", quantize=config, passes=PLAIN)
    assert all(node.op != "dequantize" or node.inputs[0].node.op == "take"
               for node in plan.graph.nodes)  # fmt: skip
    return {w.name: w.bits for w in plan.weights()}, plan


def reasons(plan: qg.Plan) -> dict[str, str]:
    return {e.name or e.what: e.reason for e in plan.ledger() if e.made_by == "quantize-weights"}


def test_without_rules_all_but_what_the_group_does_not_divide() -> None:
    bits, plan = quantized(qg.Quantize(8))
    assert bits == {"table": 8, "up": 8, "down": 8}
    assert reasons(plan)["odd"] == "group_size=64 does not divide 40"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (qg.Quantize(4, where="*u*"), {"up": 4}),
        (qg.Quantize(4, where=lambda name, shape: shape[0] > 100), {"up": 4}),
        (qg.Quantize(4, where={"d*": {"bits": 6}, "t*": False, "*": True}), {"up": 4, "down": 6}),
        (qg.Quantize(4, where={"up": {"mode": "mxfp8"}}), {"up": 8}),
        (qg.Quantize(4, embeddings=qg.Quantize(8)), {"table": 8, "up": 4, "down": 4}),
        (qg.Quantize(4, embeddings=False), {"up": 4, "down": 4}),
    ],
)
def test_rules(config: qg.Quantize, expected: dict[str, int]) -> None:
    assert quantized(config)[0] == expected


def test_the_head_has_its_own_rule() -> None:
    def fn(ids: Any) -> Any:
        h = qg.tanh(qg.take(W["table"], ids, 0) @ qg.transpose(W["up"]))
        return h @ qg.transpose(W["down"])

    assert quantized(qg.Quantize(4, head=False), fn)[0] == {"table": 4, "up": 4}
    assert quantized(qg.Quantize(4, head={"bits": 8}), fn)[0]["down"] == 8


def test_a_rule_that_matches_nothing_is_reported() -> None:
    plan = quantized(qg.Quantize(4, where={"nothing.*": True, "up": True}))[1]
    assert "matched no weight" in reasons(plan)["rule 'nothing.*'"]
    assert "rule 'up'" not in reasons(plan)


def test_what_else_reads_a_weight_keeps_it_dense() -> None:
    def fn(ids: Any) -> Any:
        return qg.take(W["up"], ids, 0) @ qg.transpose(W["up"]), qg.sum(W["up"])

    bits, plan = quantized(qg.Quantize(4), fn)
    assert bits == {}
    assert "sum reads it too" in reasons(plan)["up"]


def test_in_loops_and_for_parameters() -> None:
    square = mx.random.normal((64, 64), key=mx.random.key(9))
    mx.eval(square)
    x = mx.ones((2, 64))

    def fn(v: Any, x: Any) -> Any:
        return qg.fori_loop(0, 3, lambda i, h: qg.tanh(h @ qg.transpose(square)), x) @ v.T

    v = mx.random.normal((128, 64), key=mx.random.key(10))
    graph = qg.trace(fn, v, x, parameters=[0])
    program = qg.compile(graph, quantize=qg.Quantize(8), target="cpu")
    stages = {n.stage for n in program.plan.graph.nodes if n.op == "quantize"}
    assert stages == {"pack", "prepare"}
    h = x
    for _ in range(3):
        h = mx.tanh(mx.quantized_matmul(h, *mx.quantize(square, bits=8), bits=8))
    expected = mx.quantized_matmul(h, *mx.quantize(v, bits=8), bits=8)
    assert mx.allclose(program(v, x), expected, rtol=1e-4, atol=1e-4).item()
    program.plan.check(v, x)


def test_what_is_packed_stays_as_it_is() -> None:
    lm = model("llama")
    nn.quantize(lm, group_size=32, bits=8)
    graph = qg.from_mlx(lm, IDS)
    program = qg.compile(graph, target="cpu", quantize=qg.Quantize(4), passes=PLAIN)
    assert not packed_weights(program)
    assert mx.array_equal(program(IDS), lm(IDS)).item()


def test_settings_are_checked() -> None:
    with pytest.raises(QuantizationError, match="bits=7"):
        qg.Quantize(7)
    with pytest.raises(QuantizationError, match="answered 'four'"):
        quantized(qg.Quantize(where=lambda name, shape: "four"))


def test_a_graph_without_weights_is_returned_as_it_is() -> None:
    graph = qg.trace(lambda x: qg.tanh(x), qg.spec((4,)))
    assert QuantizeWeights(qg.Quantize())(graph) is graph


def recipe(low: int, high: int, layers: int) -> dict[str, Any]:
    """mlx-lm's mixed precision as a table of rules: more bits where errors cost most."""
    first = layers // 8
    careful = [i for i in range(layers)
               if i < first or i >= 7 * layers // 8 or (i - first) % 3 == 2]  # fmt: skip
    parts = ("v_proj", "v_a_proj", "v_b_proj", "down_proj")
    rules = {f"model.layers.{i}.*{part}*": {"bits": high} for i in careful for part in parts}
    return {**rules, "lm_head*": {"bits": high}, "*": {"bits": low}}


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("mixed_2_6", 2, 6), ("mixed_3_4", 3, 4), ("mixed_3_6", 3, 6), ("mixed_4_6", 4, 6)],
)
def test_mixed_precision_of_mlx_lm(name: str, low: int, high: int) -> None:
    convert = pytest.importorskip("mlx_lm.convert")
    llama = importlib.import_module("mlx_lm.models.llama")
    config = SIZES | {"num_hidden_layers": 11, "tie_word_embeddings": False}
    lm = llama.Model(llama.ModelArgs.from_dict({"model_type": "llama", **config}))
    lm.eval()
    mx.eval(lm.parameters())
    graph = qg.from_mlx(lm, IDS)
    config = qg.Quantize(low, where=recipe(low, high, layers=11))
    program = qg.compile(graph, target="cpu", quantize=config, passes=PLAIN)
    packed = packed_weights(program)
    chosen = {w.name: w.bits for w in program.plan.weights()}
    predicate = convert.mixed_quant_predicate_builder(name, lm, 64)
    nn.quantize(
        lm,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and predicate(path, module)
        ),
    )
    wanted = {f"{p}.weight": m.bits for p, m in lm.named_modules() if hasattr(m, "bits")}
    assert chosen == wanted
    assert set(wanted.values()) == {low, high}
    weights = dict(tree_flatten(lm.parameters()))
    assert all(mx.array_equal(parts[0], weights[path]).item() for path, parts in packed.items())
    assert mx.array_equal(program(IDS), lm(IDS)).item()
    used = {e.what for e in program.plan.ledger() if e.reason.startswith("this rule matched")}
    assert all("v_a_proj" in rule or "v_b_proj" in rule for rule in used)


def test_refusals_say_what_and_where() -> None:
    """A line a weight in the report, and the source line where the weight has one."""
    plan = quantized(qg.Quantize(8, where={"odd": True, "up": True, "down": False}))[1]
    found = {e.name: e for e in plan.ledger() if e.made_by == "quantize-weights" and e.name}
    assert found["odd"].decision == "refused"
    assert found["up"].decision == "chosen"
    assert found["up"].reason == "8 bits, groups of 64, affine"
    assert found["down"].decision == found["table"].decision == "kept"
    report = plan.report()
    assert "not quantized: odd f32[64,40]: group_size=64 does not divide 40" in report
    assert "table" not in report.splitlines()[-1]


@pytest.mark.parametrize(
    ("spelt", "shape"),
    [("bk,nk->bn", (64, 64)), ("bn,nk->bk", (64, 64)), ("bk,ehk->beh", (4, 16, 64))],
)
def test_products_spelt_as_einsum(spelt: str, shape: tuple[int, ...]) -> None:
    w = mx.random.normal(shape, key=mx.random.key(0))
    x = mx.random.normal((2, 64), key=mx.random.key(1))
    graph = qg.trace(lambda x: qg.einsum(spelt, x, w), x)
    plan = qg.optimize(graph, quantize=qg.Quantize(bits=8), passes=PLAIN, target="cpu")
    found = [n.op for n in plan.graph.nodes]
    assert "quantized_matmul" in found
    assert "dequantize" not in found
    plan.check(x)
    dense = mx.dequantize(*mx.quantize(w, 64, 8), 64, 8)
    actual = qg.compile(plan.graph, passes=[], target="cpu")(x)
    assert mx.allclose(actual, mx.einsum(spelt, x, dense), rtol=1e-4, atol=1e-4)


def test_groups_that_would_not_run_whole() -> None:
    w = mx.random.normal((8, 2, 64), key=mx.random.key(0))
    graph = qg.trace(lambda x: qg.einsum("bhd,nhd->bn", x, w), qg.spec((3, 2, 64)))
    plan = qg.optimize(graph, quantize=qg.Quantize(), target="cpu")
    assert "quantize" not in [n.op for n in plan.graph.nodes]
    assert any("no quantized product does what einsum does" in e.reason for e in plan.ledger())


def test_one_row_of_a_packed_table() -> None:
    """A single row has one axis, and dequantize takes two; the table is not made dense for it."""
    parts = mx.quantize(mx.random.normal((8, 64), key=mx.random.key(1)))
    mx.eval(parts)

    def fn(token: Any, x: Any) -> Any:
        table = qg.dequantize(*parts)
        return (qg.take(table, token, 0) + table[token]) * x

    token, x = mx.array(2), mx.array(2.0)
    program = qg.compile(fn, token, x, target="cpu")
    rows = mx.dequantize(*parts)
    assert mx.array_equal(program(token, x), (rows[2] + rows[2]) * x).item()
    dense = [n for n in program.plan.graph.nodes if n.op == "dequantize"]
    assert {n.output.type.shape for n in dense} == {(1, 64)}


@pytest.mark.parametrize("where", [None, "*", False, lambda name, shape: False])
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 3, 16), (3, 7, 80)])
def test_convolutions_stay_whatever_their_shape(shape: tuple[int, ...], where: Any) -> None:
    """No quantized product does what they do; asked without quantizing anything."""
    w = mx.random.normal(shape, key=mx.random.key(5))
    x = mx.random.normal((1, 9, shape[-1]), key=mx.random.key(6))
    config = qg.Quantize(4, where=where if where is not False else (lambda name, shape: False))
    program = qg.compile(lambda x: qg.conv1d(x, w), x, quantize=config, target="cpu")
    assert not program.plan.weights()
    assert mx.allclose(program(x), mx.conv1d(x, w), rtol=1e-5, atol=1e-5)


def test_what_mlx_cannot_quantize_is_refused_in_the_ledger() -> None:
    """`nvfp4` takes an even number of groups in all: mlx 0.32.4 packs two at a time."""
    w = mx.random.normal((3, 48), key=mx.random.key(5))
    plan = qg.compile(
        lambda x: x @ w.T, qg.spec((2, 48)), quantize=qg.Quantize(mode="nvfp4"), target="cpu"
    ).plan
    (entry,) = [e for e in plan.ledger() if e.decision == "refused"]
    assert "Cannot reshape" in entry.reason
