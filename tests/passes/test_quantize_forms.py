"""`quantize=`: weights in the forms in which models use them, in loops and branches too."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.passes import EliminateDeadCode, FuseQuantizedMatmul, HoistQuantize, SinkDequantize

PLAIN = [SinkDequantize(), FuseQuantizedMatmul(), HoistQuantize(), EliminateDeadCode()]
TABLE, WIDE, LAYERS = (mx.random.normal(shape, key=mx.random.key(5)) / 8
                       for shape in ((32, 64), (192, 64), (3, 64, 64)))  # fmt: skip


def _split(x: Any) -> Any:
    q, k, v = qg.split(qg.tensor(WIDE), 3, axis=0)
    return (x @ q.T) * (x @ k.T) + x @ v.T


FORMS: dict[str, Any] = {
    "rows by index": lambda x: x + qg.tensor(TABLE)[mx.array([3, 1])],
    "split": _split,
    "slices": lambda x: x @ qg.tensor(WIDE)[:64].T + x @ qg.tensor(WIDE)[64:128].T,
    "a layer of a stack": lambda x: x @ qg.tensor(LAYERS)[1].T,
    "scanned": lambda x: qg.scan(lambda h, w: (qg.tanh(h @ w.T), h[0]), x, LAYERS)[0],
    "indexed in a loop": lambda x: qg.fori_loop(
        0, 3, lambda i, h: qg.tanh(h @ qg.tensor(LAYERS)[i].T), x
    ),
    "carried": lambda x: qg.fori_loop(
        0, 3, lambda i, c: (qg.tanh(c[0] @ c[1].T), c[1]), (x, WIDE[:64])
    )[0],
    "an operand of a branch": lambda x: qg.cond(
        x.sum() < 1e9, lambda h, w: h @ w.T, lambda h, w: h, x, qg.tensor(WIDE)[:64]
    ),
}


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, mode: str) -> None:
    """As dense weights that went through quantization; nothing is left to pack at a call."""
    x = mx.random.normal((2, 64), key=mx.random.key(1))
    graph = qg.trace(FORMS[form], x)
    plan = qg.optimize(graph, quantize=qg.Quantize(mode=mode), target="cpu", passes=PLAIN)
    plan.check(x)
    found = [(n.op, n.stage) for _, n in plan.graph.walk()]
    assert ("quantize", "pack") in found
    assert ("quantize", "run") not in found
    assert not {"matmul", "einsum"} & {op for op, _ in found}
    dense = [n.output.type.size for _, n in plan.graph.walk() if n.op == "dequantize"]
    assert dense == ([2 * 64] if form == "rows by index" else [])


def test_a_weight_that_changes_in_a_loop_is_not_quantized() -> None:
    def fn(x: Any) -> Any:
        return qg.fori_loop(0, 2, lambda i, c: (c[0] @ c[1].T, c[1] * 0.5), (x, WIDE[:64]))[0]

    graph = qg.trace(fn, qg.spec((2, 64)))
    plan = qg.optimize(graph, quantize=qg.Quantize(), passes=PLAIN, target="cpu")
    assert "quantize" not in [n.op for _, n in plan.graph.walk()]
