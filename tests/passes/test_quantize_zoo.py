"""`Quantize.as_mlx` on architectures of mlx-lm: the weights and the logits of `mlx.nn.quantize`.

By default a few of them; all with QGRAPH_ZOO=all.
"""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import qgraph as qg
from tests.importer.test_zoo import EXACT
from tests.support import zoo

pytest.importorskip("mlx_lm")

FAIL_IN_MLX = {
    "afm7": "a layer's to_quantized takes no mode",
    "llama4_text": "the tied head multiplies by the packed table",
    "minicpm": "the tied head multiplies by the packed table",
    "seed_oss": "the tied head multiplies by the packed table",
}
MIXED = ["bailing_moe_v3", "deepseek_v3", "deepseek_v41", "gpt_oss", "kimi_k3", "nemotron_h"]
"""With routers and other weights of products that are no layers, or predicates of their own."""
ALL = [name for name in EXACT if name not in FAIL_IN_MLX]
FEW = ALL if os.environ.get("QGRAPH_ZOO") == "all" else sorted({*ALL[4::16], *MIXED})
GROUP = 32


def quantize_in_mlx(lm: Any) -> None:
    """As mlx-lm converts models."""
    asked = getattr(lm, "quant_predicate", None)

    def wanted(path: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % GROUP:
            return False
        return asked(path, module) if asked else True

    nn.quantize(lm, GROUP, 4, class_predicate=wanted)


def run_in_mlx(lm: Any) -> None:
    quantize_in_mlx(lm)
    mx.eval(lm(zoo.IDS))


@pytest.mark.parametrize("name", FEW)
def test_the_same_weights_and_logits(name: str) -> None:
    lm = zoo.build(name)
    ids, other = zoo.inputs(name)
    graph = qg.from_mlx(lm, ids)
    config = qg.Quantize.as_mlx(lm, bits=4, group_size=GROUP)
    program = qg.compile(graph, target="cpu", quantize=config)
    packed = {weight.name: weight.bits for weight in program.plan.weights()}
    read = {node.args["name"] for node in graph.constants()}
    floats = dict(tree_flatten(lm.parameters()))
    quantize_in_mlx(lm)
    bits = {f"{path}.weight": m.bits for path, m in lm.named_modules() if hasattr(m, "bits")}
    assert packed == {
        path: count
        for path, count in bits.items()
        if path in read and floats[path].dtype != mx.uint32
    }
    assert packed
    for tokens in (ids, other):
        expected, actual = lm(tokens), program(tokens)
        forbidden = expected == -float("inf")
        error = mx.abs(mx.where(forbidden, 0, actual - expected)).max()
        assert (error / mx.abs(mx.where(forbidden, 0, expected)).max()).item() < 1e-2


@pytest.mark.parametrize("name", ["gpt_oss", "kimi_k3", "phixtral"])
def test_any_product_without_a_rule_but_no_bias(name: str) -> None:
    lm = zoo.build(name)
    plan = qg.optimize(
        qg.from_mlx(lm, zoo.IDS), target="cpu", quantize=qg.Quantize(4, group_size=GROUP)
    )
    packed = {weight.name for weight in plan.weights()}
    assert packed
    assert not any(path.endswith(".bias") for path in packed)


@pytest.mark.parametrize("name", FAIL_IN_MLX)
def test_what_fails_in_mlx_works_here(name: str) -> None:
    lm = zoo.build(name)
    config = qg.Quantize.as_mlx(lm, bits=8, group_size=GROUP)
    program = qg.compile(qg.from_mlx(lm, zoo.IDS), target="cpu", quantize=config)
    expected = lm(zoo.IDS)
    error = mx.abs(program(zoo.IDS) - expected).max() / mx.abs(expected).max()
    assert 0 < error.item() < 0.1
    with pytest.raises((TypeError, ValueError)):
        run_in_mlx(lm)
