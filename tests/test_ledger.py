"""`plan.ledger()` speaks of every quantize, dequantize and product of the graph as written."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

import qgraph as qg

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
    assert all(e.reason or e.case for e in entries)
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
    assert lines[0].startswith("fused (case 1) matmul with f32[64,64] test_ledger.py:")
    assert lines[1].startswith("fused dequantize of u32[64,8] test_ledger.py:")
