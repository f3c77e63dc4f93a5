"""Programs as .mlxfn files: what MLX alone computes with them is what the program computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from qgraph.kernels import Problem
from qgraph.kernels.choice.tuner import Choice
from tests.support.compiler import needs_compiler
from tests.support.passes import passes_without


def imported(path: Path, *inputs: mx.array) -> list[np.ndarray]:
    """The results of the file in a process that knows nothing of qgraph."""
    folder = path.parent
    mx.save_safetensors(str(folder / "in.safetensors"), {str(i): a for i, a in enumerate(inputs)})
    code = f"""
import sys, mlx.core as mx
given = mx.load({str(folder / "in.safetensors")!r})
f = mx.import_function({str(path)!r})
out = f(*[given[str(i)] for i in range(len(given))])
mx.save_safetensors({str(folder / "out.safetensors")!r}, {{str(i): a for i, a in enumerate(out)}})
assert "qgraph" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    found = mx.load(str(folder / "out.safetensors"))
    return [np.array(found[str(i)]) for i in range(len(found))]


def plain_passes() -> list[qg.Pass]:
    return passes_without("choose-kernel", "form-regions")


def test_a_quantized_layer_with_a_loop(tmp_path: Path) -> None:
    mx.random.seed(0)
    w, scale = mx.random.normal((64, 64)), mx.random.normal((64,))

    def layer(x: qg.Tensor, y: qg.Tensor) -> tuple[qg.Tensor, qg.Tensor]:
        h = qg.fori_loop(0, 3, lambda i, h: qg.tanh(qg.quantized_matmul(h, w)) + i, x)
        return h * scale, qg.exp(y)

    specs = [qg.spec((2, 64)), qg.spec((5,))]
    program = qg.compile(layer, *specs, target="cpu", passes=plain_passes())
    path = program.export(tmp_path / "layer.mlxfn")
    x, y = mx.random.normal((2, 64)), mx.random.normal((5,))
    results = imported(path, x, y)
    for found, wanted in zip(results, program(x, y), strict=True):
        np.testing.assert_allclose(found, np.array(wanted), rtol=1e-6, atol=1e-6)
    # And against NumPy, from the weight that quantization stands for.
    packed = mx.quantize(w)
    dense = np.array(mx.dequantize(*packed), np.float64)
    h = np.array(x, np.float64)
    for i in range(3):
        h = np.tanh(h @ dense.T) + i
    np.testing.assert_allclose(results[0], h * np.array(scale), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(results[1], np.exp(np.array(y)), rtol=1e-6)


def test_products_on_several_streams_run_on_one(tmp_path: Path) -> None:
    mx.random.seed(1)
    weights = [mx.random.normal((512, 512)) for _ in range(2)]
    program = qg.compile(
        lambda x: [qg.quantized_matmul(x, w) for w in weights],
        qg.spec((1, 512)), target="cpu", passes=plain_passes(),
    )  # fmt: skip
    path = program.export(tmp_path / "two.mlxfn")
    x = mx.random.normal((1, 512))
    for found, wanted in zip(imported(path, x), program(x), strict=True):
        np.testing.assert_allclose(found, np.array(wanted), rtol=1e-6, atol=1e-5)


def test_trees_become_lists_in_order(tmp_path: Path) -> None:
    program = qg.compile(lambda d: {"sum": d["a"] + d["b"][0]}, {"a": qg.spec((3,)),
                         "b": [qg.spec((3,))]}, target="cpu")  # fmt: skip
    path = program.export(tmp_path / "tree.mlxfn")
    (total,) = imported(path, mx.array([1.0, 2.0, 3.0]), mx.array([10.0, 20.0, 30.0]))
    assert total.tolist() == [11.0, 22.0, 33.0]


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    loop = qg.compile(
        lambda x: qg.while_loop(lambda h: qg.sum(h) < 10, lambda h: h * 2, x),
        qg.spec((4,)), target="cpu",
    )  # fmt: skip
    with pytest.raises(qg.QGraphError, match="driven from the host") as caught:
        loop.export(tmp_path / "loop.mlxfn")
    assert "test_export.py" in str(caught.value)
    parameters = qg.compile(lambda w, x: x @ w, qg.spec((4, 4)), qg.spec((1, 4)), parameters=[0])
    with pytest.raises(qg.QGraphError, match="has parameters"):
        parameters.export(tmp_path / "p.mlxfn")
    several = qg.jit(lambda x: x + 1)
    with pytest.raises(qg.QGraphError, match="0 specialisations"):
        several.export(tmp_path / "j.mlxfn")
    with pytest.raises(qg.QGraphError, match="does not end in"):
        loop.export(tmp_path / "loop.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [pytest.param("simd", marks=needs_compiler), "host-blas", "dense+host-blas"]
)
def test_products_from_the_host(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own product reads the same packed weight, or the same dense one."""

    def forced(problem: Problem, names: Sequence[str], **_: Any) -> Choice:
        return Choice(name, "table", 1.0) if name in names else Choice("qmm", "table", 1e6)

    monkeypatch.setattr("qgraph.passes.choose_kernel.choose", forced)
    w = mx.random.normal((512, 512), key=mx.random.key(1)) / 23
    x = mx.random.normal((4, 512), key=mx.random.key(2))
    turns = lambda x: qg.fori_loop(0, 3, lambda i, h: qg.tanh(qg.quantized_matmul(h, w)), x)  # noqa: E731
    passes = passes_without("form-regions", budget=1 << 40)
    program = qg.compile(turns, x, target="cpu", passes=passes)
    assert {n.kernel for _, n in program.plan.graph.walk() if n.kernel} == {name}
    path = tmp_path / "f.mlxfn"
    (y,) = imported(program.export(path), x)
    dense = mx.dequantize(*mx.quantize(w))
    expected = np.array(x, np.float64)
    for _ in range(3):
        expected = np.tanh(expected @ np.array(dense, np.float64).T)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@needs_compiler
def test_attention_from_the_host(tmp_path: Path) -> None:
    length = 600
    q = mx.random.normal((1, 4, 1, 64), key=mx.random.key(1))
    k = mx.random.normal((1, 2, length, 64), key=mx.random.key(2))

    def fn(q: Any, k: Any, last: Any) -> Any:
        mask = qg.arange(length) <= last
        return qg.fast.scaled_dot_product_attention(q, k, k, scale=0.1, mask=mask)

    passes = passes_without("form-regions")
    program = qg.compile(fn, q, k, mx.array(7), target="cpu", passes=passes)
    assert {n.kernel for n in program.plan.graph.nodes if n.op == "decode_attention"} == {
        "host-attention"
    }
    (y,) = imported(program.export(tmp_path / "f.mlxfn"), q, k, mx.array(7))
    np.testing.assert_allclose(y, program(q, k, mx.array(7)), rtol=1e-4, atol=1e-6)


VIEWS = {
    "transposed": lambda w: w.T,
    "rows the other way round": lambda w: w[::-1],
    "every other row": lambda w: w[::2],
    "columns": lambda w: w[:, 3:7],
    "broadcast": lambda w: mx.broadcast_to(w[:1], (8, 8)),
    "a diagonal": lambda w: mx.as_strided(w, (8,), (9,), 0),
}


@pytest.mark.parametrize("view", VIEWS)
def test_constants_that_are_views(view: str, tmp_path: Path) -> None:
    w = VIEWS[view](mx.random.normal((8, 8), key=mx.random.key(0)))
    mx.eval(w)
    program = qg.compile(lambda x: qg.tanh(w) * x, qg.spec(()), target="cpu")
    (y,) = imported(program.export(tmp_path / "f.mlxfn"), mx.array(2.0))
    np.testing.assert_allclose(y, np.tanh(np.array(w)) * 2, rtol=1e-6)

    def turns(x: qg.Tensor) -> qg.Tensor:  # a constant of a body
        return qg.fori_loop(0, 2, lambda i, h: h + qg.sum(qg.multiply(w, w[:1])), x)

    program = qg.compile(turns, qg.spec(()), target="cpu", passes=[])
    (y,) = imported(program.export(tmp_path / "g.mlxfn"), mx.array(2.0))
    np.testing.assert_allclose(y, np.array(turns(mx.array(2.0))), rtol=1e-5)


def test_a_float_layer(tmp_path: Path) -> None:
    layer, x = nn.Linear(5, 3), mx.random.normal((2, 5))
    program = qg.compile(qg.from_mlx(layer, x), target="cpu")
    (y,) = imported(program.export(tmp_path / "f.mlxfn"), x)
    np.testing.assert_allclose(y, np.array(layer(x)), rtol=1e-5, atol=1e-6)


def test_a_file_that_computes_something_else_is_not_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = mx.random.normal((3, 4)).T
    program = qg.compile(lambda x: x @ w, qg.spec((2, 4)), target="cpu")
    path = program.export(tmp_path / "f.mlxfn")
    before = path.read_bytes()
    monkeypatch.setattr("qgraph.runtime.export.mx.contiguous", lambda array: array)
    with pytest.raises(qg.QGraphError, match="computes something else"):
        program.export(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(qg.QGraphError, match="cannot export"):
        program.export(tmp_path / "no such folder" / "f.mlxfn")
