"""What each process of `test_peers.py` runs: `python -m tests.gpu.peer_rank BACKEND`.

Over `ring` the ranks are processes of one GPU that take turns on it.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.analysis.meshes import is_collective
from qgraph.ir.loops import REGION
from qgraph.runtime.executable import Executable
from qgraph.runtime.packing import PackCache
from qgraph.runtime.regions.cuda.peers import connect
from tests.gpu.test_grid_regions import llama

TOKENS = 40


def kept_in_parts(fn: Any, given: Any, mesh: qg.Mesh) -> tuple[Any, qg.Plan]:
    """A program whose caches, the third argument and the second result, stay in parts; its plan."""
    flat = qg.tree.flatten((given, {}), static=True)[0]
    states = [(2 + i, 1 + i) for i in range(len(flat) - 2)]
    plan = qg.optimize(qg.trace(fn, *given), mesh=mesh, states=states)
    executable = Executable(
        plan.graph, plan.target, PackCache(), release=False, progress=None, states=states
    )

    def call(given: Any) -> Any:
        arrays = qg.tree.flatten((given, {}), static=True)[0]
        return executable(executable.in_parts(arrays))

    return call, plan


def main(backend: str) -> None:
    mx.set_default_device(mx.gpu)
    mesh = qg.Mesh.of(mx.distributed.init(strict=True, backend=backend), "nccl")
    assert connect(mesh) is not None, "the ranks reach no memory of each other"
    model = llama(64, hidden=4096, vocab=32768)

    def step(token: Any, position: Any, cache: Any) -> Any:
        h, cache = model.forward(token, cache, position)
        return model.logits(h), cache

    given = mx.array([[5]]), mx.array(3, mx.int32), model.empty_cache()
    one = qg.compile(step, *given, target="gpu")(*given)[0].astype(mx.float32)
    program, plan = kept_in_parts(step, given, mesh)
    regions = [n for _, n in plan.graph.walk() if n.op == REGION]
    assert [sum(map(is_collective, n.bodies[0].nodes)) for n in regions] == [0, 2, 2]
    first = program(given)[0].astype(mx.float32)
    assert mx.linalg.norm(first - one).item() < 2e-2 * mx.linalg.norm(one).item()
    for _ in range(2):
        token, cache, tokens = given[0], given[2], []
        for i in range(TOKENS):
            logits, cache = program((token, mx.array(i, mx.int32), cache))
            token = mx.argmax(logits[:, -1], axis=-1, keepdims=True).astype(mx.int32)
            tokens.append(token.item())
        print("tokens", *tokens, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
