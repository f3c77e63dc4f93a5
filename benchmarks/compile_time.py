"""Trace, optimize and first call of graphs of 100 to 30,000 nodes.

    python -m benchmarks.compile_time

The graphs are layers of quantized products, norms and element-wise ops, as models have them.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

import qgraph as qg

SIZES = (100, 300, 1000, 3000, 10_000, 30_000)
NODES_A_LAYER = 10


def model(layers: int, weights: list[mx.array], scale: mx.array) -> Any:
    def fn(x: Any) -> Any:
        for i in range(layers):
            w = weights[i % len(weights)]
            h = qg.fast.rms_norm(x, scale, 1e-5)
            h = qg.quantized_matmul(h, w) + qg.tensor(w)[0]
            x = x + qg.sigmoid(h) * h.reshape(1, 64).transpose().T
        return x

    return fn


def main() -> None:
    weights = [mx.random.normal((64, 64), key=mx.random.key(i)) for i in range(8)]
    scale = mx.ones(64)
    mx.eval(weights, scale)
    x = mx.ones((1, 64))
    mx.eval(qg.compile(model(3, weights, scale), x)(x))  # compilers and caches warm
    table = Table(title="seconds, and microseconds a node", title_justify="left")
    for heading in ("nodes", "trace", "optimize", "pack", "first call", "all", "us a node"):
        table.add_column(heading, justify="right")
    a_node = {}
    for size in SIZES:
        start = time.perf_counter()
        graph = qg.trace(model(size // NODES_A_LAYER, weights, scale), x)
        traced = time.perf_counter()
        plan = qg.optimize(graph)
        optimized = time.perf_counter()
        program = qg.Program(None, plan)
        packed = time.perf_counter()
        mx.eval(program(x))
        done = time.perf_counter()
        nodes = graph.count()
        a_node[size] = 1e6 * (done - start) / nodes
        marks = (start, traced, optimized, packed, done)
        parts = [f"{b - a:.3f}" for a, b in pairwise(marks)]
        table.add_row(f"{nodes:,}", *parts, f"{done - start:.3f}", f"{a_node[size]:.0f}")
    Console(width=100).print(table)
    spread = max(a_node.values()) / min(a_node.values())
    print(f"largest over smallest time a node: {spread:.2f} (at most 2)")
    print(f"10,000 nodes: {a_node[10_000] / 100:.2f} s (under 5)")


if __name__ == "__main__":
    main()
