"""While one thread imports, others compute with MLX as it is."""

from __future__ import annotations

import threading

import mlx.core as mx

import qgraph as qg


def test_another_thread_is_not_recorded() -> None:
    reached, done = threading.Event(), threading.Event()
    found: list[bool] = []

    def elsewhere() -> None:
        reached.wait(10)
        w = mx.random.normal((4, 64), key=mx.random.key(1))
        packed, scales, biases = mx.quantize(w)
        again = mx.dequantize(packed, scales, biases)
        inverted = ~mx.array([1, 2])
        mx.eval(again, inverted)
        found.append(mx.abs(again - w).max().item() < 0.3 and inverted.tolist() == [-2, -3])
        done.set()

    def function(x: mx.array) -> mx.array:
        y = mx.tanh(x)
        reached.set()
        done.wait(10)
        return y * 2

    thread = threading.Thread(target=elsewhere)
    thread.start()
    graph = qg.from_mlx(function, mx.ones((3,)))
    thread.join(10)
    assert found == [True]
    assert {node.op for node in graph.nodes} == {"constant", "tanh", "broadcast_to", "multiply"}
