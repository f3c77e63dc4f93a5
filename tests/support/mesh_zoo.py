"""Architectures of mlx-lm on meshes in one process: `python -m tests.support.mesh_zoo [names]`.

Prints for each model and mesh how far its logits are from those of one device, how much of its
weights a rank holds, and its collectives.
"""

from __future__ import annotations

import sys
from collections import Counter

import mlx.core as mx

import qgraph as qg
from qgraph.analysis.meshes import in_one_process, is_collective, is_spread
from qgraph.ir.graph import Graph, Value
from qgraph.ir.loops import outermost
from qgraph.kernels.streams import Streams
from qgraph.runtime.interpret import Interpreter
from tests.support import zoo


def held(graph: Graph) -> float:
    """The share of the constants' bytes that a rank holds, through views and slices of them."""
    source = outermost(graph)
    whole: dict[Value, int] = {}
    mine: dict[Value, int] = {}
    views: set[Value] = set()
    for _, node in graph.walk():
        for value in node.inputs:
            weight = source.get(value, value)
            if node.bodies or not (weight.node.op == "constant" or weight in views):
                continue
            if weight.node.op == "constant":
                whole[weight] = weight.type.nbytes
            if node.op in ("getitem", "transpose") and len(node.inputs) == 1:
                views.add(node.output)
                source[node.output] = node.output
                continue
            nbytes = node.output.type.nbytes if node.op == "distributed.part" else value.type.nbytes
            mine[weight] = min(weight.type.nbytes, mine.get(weight, 0) + nbytes)
    return sum(mine.values()) / max(sum(whole.values()), 1)


def run(graph: Graph, *arrays: mx.array) -> list[mx.array]:
    """A graph node by node, without compiling it."""
    env = dict(zip(graph.inputs, arrays, strict=True))
    interpreter = Interpreter(Streams(mx.Device(mx.cpu, 0)))
    for node in graph.nodes:
        interpreter.run(node, env)
    return [env[v] for v in graph.outputs]


def compare(graph: Graph, ranks: int, *arrays: mx.array) -> tuple[float, qg.Plan, list[mx.array]]:
    """How far a mesh is from one device, the largest difference over the largest number.

    Both as it was spread and as the plan is in the end.
    """
    plan = qg.optimize(graph, target="cpu", mesh=qg.Mesh(ranks))
    wanted = run(graph, *arrays)
    worst = 0.0
    for after in (next(s.after for s in plan.steps if s.name == "shard"), plan.graph):
        results = run(in_one_process(after, ranks) if is_spread(after) else after, *arrays)
        for one, mesh in zip(wanted, results, strict=True):
            assert (one.shape, one.dtype) == (mesh.shape, mesh.dtype)
            size = mx.maximum(mx.max(mx.abs(one)), 1e-6).item() if one.size else 1.0
            worst = max(worst, mx.max(mx.abs(one - mesh)).item() / size if one.size else 0.0)
    return worst, plan, results


def main(names: list[str]) -> None:
    mx.set_default_device(mx.cpu)
    for name in names or zoo.architectures():
        try:
            model = zoo.build(name)
            ids, _ = zoo.inputs(name)
            graph = qg.from_mlx(model, ids)
        except Exception as error:
            print(f"{name}: not imported: {str(error).splitlines()[:1]}")
            continue
        for ranks in (2, 3, 4, 8):
            try:
                worst, plan, _ = compare(graph, ranks, ids)
            except Exception as error:
                print(f"{name} {ranks}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            shard = next(step.after for step in plan.steps if step.name == "shard")
            count = Counter(n.op.split(".")[1] for _, n in shard.walk() if is_collective(n))
            mark = "" if worst < 1e-4 else "  WRONG"
            print(f"{name} {ranks}: {worst:.1e}, holds {held(shard):.2f}, {dict(count)}{mark}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
