"""`plan.ledger()` speaks of every quantize, dequantize and product of the graph as written."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.ir import OPS

W = mx.ones((64, 64))
Q = mx.quantize(W)


def test_every_one_is_there_with_a_decision() -> None:
    def fn(x: Any, changing: Any) -> Any:
        a = qg.quantized_matmul(x, W)
        dense = qg.dequantize(*Q)
        b = x @ dense.T
        c = dense * x.sum()
        d = x @ x.T
        e = x @ qg.dequantize(*Q).reshape(128, 32)[:64].T.reshape(64, 32)
        f = qg.quantize(changing)
        return a, b, c, d, e, f

    plan = qg.optimize(qg.trace(fn, qg.spec((2, 64)), qg.spec((64, 64))))
    entries = plan.ledger()
    source = {(n.op, n.origin.line) for _, n in plan.source.walk()
              if n.op in ("quantize", "dequantize", "matmul", "quantized_matmul")}  # fmt: skip
    mentioned = {(e.what.split()[0], e.origin.line) for e in entries}
    assert source <= mentioned
    exactly = {" ".join(e.what.split()[:3]) for e in entries}
    assert {"matmul of f32[2,64]", "dequantize of u32[64,8]", "quantize of f32[64,64]"} <= exactly
    assert all(e.reason or e.case for e in entries)
    assert all(e.what.split()[0] == e.op and e.op in OPS for e in entries)
    by_what = {(e.what.split()[0], e.decision) for e in entries}
    assert {
        ("quantize", "packed"),
        ("quantize", "kept"),
        ("matmul", "fused"),
        ("matmul", "kept"),
        ("matmul", "refused"),
        ("dequantize", "kept"),
        ("quantized_matmul", "kept"),
    } <= by_what
    reasons = {e.reason for e in entries if e.decision == "refused"}
    assert any("getitem between dequantize and the product" in r for r in reasons)


def test_entries_read_well() -> None:
    plan = qg.optimize(qg.trace(lambda x: x @ qg.dequantize(*Q).T, qg.spec((2, 64))))
    lines = [str(e) for e in plan.ledger()]
    assert lines[0].startswith(
        "fused (case 1) matmul of f32[2,64] with f32[64,64] (Q.0) test_ledger.py:"
    )
    assert lines[1].startswith("fused dequantize of u32[64,8] (Q.0) test_ledger.py:")


def reason(fn: Any, op: str, *args: Any, **options: Any) -> str:
    """Why the only `op` that `fn` holds was kept."""
    plan = qg.optimize(qg.trace(fn, *args, **options))
    (entry,) = [e for e in plan.ledger() if e.what.startswith(op + " ") and e.decision == "kept"]
    return entry.reason


def test_each_node_of_a_line_is_listed() -> None:
    def fake(w: Any) -> Any:
        return qg.dequantize(*qg.quantize(w))

    other = mx.ones((32, 64))
    plan = qg.optimize(qg.trace(lambda x: (x @ fake(W).T) @ fake(other).T, qg.spec((2, 64))))
    assert sorted(str(e).split(" test_")[0] for e in plan.ledger()) == [
        "fused (case 9) matmul of f32[2,64] with f32[32,64] (other)",
        "fused (case 9) matmul of f32[2,64] with f32[64,64] (W)",
        "fused dequantize of u32[32,8] (other)",
        "fused dequantize of u32[64,8] (W)",
        "packed quantize of f32[32,64] (other)",
        "packed quantize of f32[64,64] (W)",
    ]


def test_why_a_quantize_is_kept() -> None:
    x = qg.spec((2, 64))
    assert reason(lambda x: qg.quantize(x), "quantize", x) == (
        "it quantizes what depends on the argument x"
    )
    assert "qg.keep" in reason(lambda x: qg.quantized_matmul(x, qg.keep(W)), "quantize", x)

    def turn(i: Any, w: Any) -> Any:
        return qg.dequantize(*qg.quantize(w)) * 0.5

    words = reason(lambda x: qg.fori_loop(0, 2, turn, x), "quantize", qg.spec((64, 64)))
    assert (
        words == "it quantizes what depends on w, which changes from turn to turn of the fori_loop"
    )


def test_why_a_dequantize_is_kept() -> None:
    x = qg.spec((2, 64))
    dense = reason(lambda x: qg.dequantize(*Q).T + x.sum(), "dequantize", x)
    assert dense == "the add that reads it needs it dense"

    def fn(x: Any) -> Any:
        w = qg.dequantize(*Q)
        return w + x[0], w

    assert reason(fn, "dequantize", x) == "the add and the result that read it need it dense"
    words = reason(lambda x: x @ (qg.dequantize(*Q) * x[0]).T, "dequantize", x)
    assert words == "the multiply that reads it needs it dense"
    square = qg.spec((64, 64))
    words = reason(lambda x: qg.einsum("mk,mk->m", x, qg.dequantize(*Q)), "dequantize", square)
    assert words == "the einsum that reads it did not fuse"
    rounded = reason(lambda x: qg.dequantize(*qg.quantize(x)) @ W, "dequantize", x)
    assert rounded == "it rounds an activation, which no packed form stands for"


def test_why_a_product_is_kept() -> None:
    x = qg.spec((2, 64))
    assert reason(lambda x: x @ x.T, "matmul", x) == "neither operand is a weight"
    words = reason(lambda x: qg.fori_loop(0, 2, lambda i, h: h @ W, x), "matmul", x)
    assert words == "its weight W is float; optimize(..., quantize=) packs such weights"
    words = reason(lambda w, x: x @ w.T, "matmul", qg.spec((8, 64)), x, parameters=[0])
    assert words.startswith("its weight w is float")


def test_what_is_gone() -> None:
    def fn(x: Any) -> Any:
        a = x @ x.T
        b = x @ x.T
        qg.quantized_matmul(x, W)
        return a, b

    plan = qg.optimize(qg.trace(fn, qg.spec((2, 64))))
    said = {e.origin.source().split(" =")[0]: (e.decision, e.reason) for e in plan.ledger()}
    assert said["a"] == ("kept", "neither operand is a weight")
    assert said["b"] == ("merged", "an equal one is computed for all that read it")


def test_products_that_became_part_of_attention() -> None:
    q = mx.random.normal((1, 2, 4, 16))
    mx.eval(q)

    def attend(q: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, q, q, scale=0.25)

    plan = qg.optimize(qg.from_mlx(attend, q), target="cpu")
    merged = [e.reason for e in plan.ledger() if e.what.startswith("matmul")]
    assert set(merged) == {"it is part of fast.scaled_dot_product_attention now"}
