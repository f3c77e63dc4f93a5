"""Repeated layers shown once: of imported models, and what makes blocks alike."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg
from qgraph.inspection.fold import repeats
from tests.support.passes import passes_without


def llama(layers: int) -> Any:
    module = pytest.importorskip("mlx_lm.models.llama")
    settings = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": layers,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "vocab_size": 100, "tie_word_embeddings": True,
    }  # fmt: skip
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(settings))
    mx.eval(model.parameters())
    return model


def folded(graph: qg.Graph) -> str:
    return graph.format(fold=True, origins=False)


def test_a_llama_of_30_layers() -> None:
    graph = qg.from_mlx(llama(30), mx.array([[1, 7, 3]]), name="llama")
    plan = qg.optimize(
        graph, target="cpu", quantize=qg.Quantize(bits=4, group_size=32),
        passes=passes_without("form-regions"),
    )  # fmt: skip
    lines = folded(plan.graph).splitlines()
    assert len(plan.graph.format().splitlines()) > 1000
    start = lines.index("  30 × block:", lines.index("  pack (once):") + 1)
    end = next(i for i in range(start, len(lines)) if lines[i].startswith("    ... 29 more like"))
    block = [line.strip() for line in lines[start + 1 : end]]
    ops = Counter(line.partition(" = ")[2].partition("(")[0] for line in block)
    assert ops == {
        "fast.rms_norm": 2, "quantized_matmul": 7, "fast.rope": 2, "reshape": 11, "transpose": 4,
        "fast.scaled_dot_product_attention": 1, "add": 2, "sigmoid": 1, "multiply": 2,
    }  # fmt: skip
    first = "= fast.rms_norm(%3, @model.layers.0.input_layernorm.weight) {eps=1e-05}"
    assert block[0] == "%4: f32[1,3,64] " + first
    assert sum("model.layers.0." in line for line in block) == 9
    assert not any("model.layers.1." in line for line in lines)
    (attention,) = [line for line in block if "attention(" in line]
    assert attention.endswith("{mask=causal, scale=0.25}")
    last = block[-1].partition(":")[0].removeprefix("%")
    assert lines[end] == f"    ... 29 more like it, up to %{int(last) + 29 * len(block)}"
    assert "fast.rms_norm" in lines[end + 1]
    assert len(lines[end:]) == 6


def test_the_packed_weights_of_layers_fold_layer_by_layer() -> None:
    graph = qg.from_mlx(llama(12), mx.array([[1]]))
    plan = qg.optimize(graph, target="cpu", quantize=qg.Quantize(bits=4, group_size=32))
    lines = folded(plan.graph).splitlines()
    head = lines.index("    12 × block:")
    assert "embed_tokens" in lines[head - 1]
    block = lines[head + 1 : head + 8]
    assert all(line.lstrip().startswith("model.layers.0.") for line in block)
    assert lines[head + 8].startswith("      ... 11 more like it, up to model.layers.11.")


def test_layers_that_differ_are_not_folded_together() -> None:
    """A layer with another base of its rotation ends a run."""

    def fn(x: mx.array) -> mx.array:
        for base in (1e4, 1e4, 1e4, 1e4, 1e4, 1e6, 1e4, 1e4, 1e4, 1e4, 1e4):
            x = mx.tanh(mx.fast.rope(x, 8, traditional=False, base=base, scale=1.0, offset=0))
        return x

    plan = qg.optimize(qg.from_mlx(fn, mx.ones((1, 1, 2, 8))), target="cpu")
    blocks = [line for line in folded(plan.graph).splitlines() if "block:" in line]
    assert blocks == ["  5 × block:", "  5 × block:"]


def test_layers_that_alternate_fold_two_by_two() -> None:
    def fn(x: mx.array) -> mx.array:
        for i in range(12):
            x = mx.tanh(mx.sin(x)) if i % 2 else mx.exp(mx.cos(x))
        return x

    graph = qg.from_mlx(fn, mx.ones((4,)))
    assert [(r.size, r.count) for r in repeats(_shown(graph))] == [(4, 6)]


def test_paths_of_a_module_differ_in_numbers_only() -> None:
    class Net(nn.Module):
        def __init__(self, names: list[str]) -> None:
            super().__init__()
            self.parts = {name: mx.ones((4,)) for name in names}

        def __call__(self, x: mx.array) -> mx.array:
            for array in self.parts.values():
                x = mx.tanh(x * array)
            return x

    alike = qg.from_mlx(Net([f"layer{i}" for i in range(8)]), mx.ones((4,)))
    assert [(r.size, r.count) for r in repeats(_shown(alike))] == [(2, 8)]
    unlike = qg.from_mlx(Net(list("abcdefgh")), mx.ones((4,)))
    assert [r.count for r in repeats(_shown(unlike))] == [1]


def test_names_of_variables_do_not_matter() -> None:
    a, b, c, d, e = (mx.ones((4,)) * i for i in range(5))

    def fn(x: Any) -> Any:
        for w in (a, b, c, d, e):
            x = qg.tanh(x * w)
        return x

    graph = qg.trace(fn, qg.spec(4))
    assert [(r.size, r.count) for r in repeats(_shown(graph))] == [(2, 5)]


def test_a_value_from_before_is_the_same_in_every_block() -> None:
    def fn(x: Any, y: Any) -> Any:
        same = x
        for _ in range(6):
            same = qg.tanh(same) + y
        for i in range(6):
            same = qg.exp(same) + (y if i % 3 else x)
        return same

    graph = qg.trace(fn, qg.spec(4), qg.spec(4))
    first = repeats(_shown(graph))[0]
    assert (first.size, first.count) == (2, 6)


def _shown(graph: qg.Graph) -> list[Any]:
    return [node for node in graph.nodes if node.op != "constant"]


PLACES, LIMITS = mx.arange(8), mx.ones(8)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x[:, PLACES], lambda x: x[PLACES, :]),
        (lambda x: qg.clip(x, LIMITS, None), lambda x: qg.clip(x, None, LIMITS)),
    ],
    ids=["the place of an array in an index", "the parameter an array is given for"],
)
def test_where_a_value_stands_counts(one: Any, other: Any) -> None:
    def fn(x: Any) -> Any:
        for turn in range(8):
            x = qg.tanh(other(x) if turn % 2 else one(x))
        return x

    text = folded(qg.trace(fn, qg.spec((8, 8))))
    assert "4 × block:" in text
    assert text.count("= tanh(") == 2
