"""What is imported on a CPU and raised runs on a GPU as what is imported there: needs a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.support import zoo
from tests.support.arrays import to_numpy
from tests.support.reference import relative_error

GPU = mx.Device(mx.gpu, 0)
pytestmark = pytest.mark.skipif(not mx.is_available(GPU), reason="needs a GPU")

CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x, w: mx.fast.rms_norm(x, w, 1e-5), ((2, 8, 256), (256,))),
    "layer_norm": (
        lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5), ((2, 8, 256), (256,), (256,)),
    ),
    "rope": (
        lambda x: mx.fast.rope(x, 64, traditional=False, base=1e4, scale=1.0, offset=100),
        ((2, 4, 8, 64),),
    ),
    "attention": (
        lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal"),
        ((1, 8, 16, 64), (1, 2, 32, 64), (1, 2, 32, 64)),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    before = mx.default_device()
    yield
    mx.set_default_device(before)


def imported(fn: Any, *arrays: mx.array, on: Any) -> qg.Graph:
    mx.set_default_device(on)
    return qg.from_mlx(fn, *arrays, name="f")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_one_op(name: str, dtype: mx.Dtype) -> None:
    fn, shapes = CASES[name]
    mx.set_default_device(mx.cpu)
    arrays = [mx.random.normal(s, key=mx.random.key(i)) for i, s in enumerate(shapes)]
    arrays = [a.astype(dtype) for a in arrays]
    exact = to_numpy(fn(*[a.astype(mx.float32) for a in arrays])).astype(np.float64)
    mx.eval(arrays)
    graph = imported(fn, *arrays, on=mx.cpu)
    mx.set_default_device(mx.gpu)
    program = qg.compile(graph, target="gpu")
    ops = [n.op for n in program.plan.graph.nodes if n.op != "constant"]
    assert len(ops) == 1
    assert ops[0].startswith("fast.")
    result = program(*arrays)
    assert relative_error(to_numpy(result), exact) < 2e-2
    plan = qg.optimize(graph, target="gpu")
    assert {s.contract for s in plan.steps if s.name.startswith("raise-")} >= {"tolerance 2e-2"}
    plan.check(*arrays)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_a_model_is_the_same_wherever_it_is_imported(name: str) -> None:
    pytest.importorskip("mlx_lm")
    mx.set_default_device(mx.cpu)
    model = zoo.build(name)
    ids, _ = zoo.inputs(name)
    mx.eval(ids)
    programs = [
        qg.compile(imported(model, ids, on=device), target="gpu") for device in (mx.cpu, mx.gpu)
    ]
    fast = [Counter(n.op for n in p.plan.graph.nodes if n.op.startswith("fast.")) for p in programs]
    assert fast[0]["fast.rope"] == fast[1]["fast.rope"]
    norms = ("fast.rms_norm", "fast.layer_norm")
    assert [fast[0][n] for n in norms] == [fast[1][n] for n in norms]
    assert fast[0]["fast.scaled_dot_product_attention"] == 2
    mx.set_default_device(mx.gpu)
    expected = to_numpy(model(ids))
    for program in programs:
        assert relative_error(to_numpy(program(ids)), expected) < 1e-3
