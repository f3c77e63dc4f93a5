"""What each process of `test_peers.py` runs: `python -m tests.gpu.peer_rank BACKEND`.

Over `ring` the ranks are processes of one GPU that take turns on it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.analysis.meshes import is_collective
from qgraph.ir.loops import REGION
from qgraph.runtime.executable import Executable
from qgraph.runtime.packing import PackCache
from qgraph.runtime.regions.cuda.exchange import exchange
from qgraph.runtime.regions.cuda.peers import Peers, connect
from qgraph.runtime.regions.cuda.region import COUNTERS
from tests.gpu.test_grid_regions import llama

TOKENS = 40
ROWS = 16384


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


def exchange_all(peers: Peers, rank: int) -> None:
    """Collectives of some sizes and dtypes, one after the other: all right, to the last bit."""
    last = mx.zeros((COUNTERS,), mx.uint32)
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        for count in (2, 4098, 100_002, 1 << 20):
            keys = mx.random.split(mx.random.key(count), 2)
            xs = [mx.random.normal((count,), key=key).astype(dtype) for key in keys]
            total = (xs[0].astype(mx.float32) + xs[1].astype(mx.float32)).astype(dtype)
            wanted = {
                "all_sum": total,
                "all_gather": mx.concatenate(xs),
                "all_max": mx.maximum(*xs),
                "all_min": mx.minimum(*xs),
                "sum_scatter": mx.split(total, 2)[rank],
            }
            for op, right in wanted.items():
                found, last = exchange(op, xs[rank], peers, last)
                assert mx.array_equal(found, right).item(), (op, dtype, count)


def prompt_in_halves(mesh: qg.Mesh) -> None:
    """Rows that are summed in halves, each beside the other's products, give one device's."""
    model = llama(ROWS, hidden=1024, vocab=4096)
    tokens = mx.arange(ROWS)[None] % 4096

    def prompt(tokens: Any) -> Any:
        h, _ = model.forward(tokens, model.empty_cache())
        return model.logits(h[:, -8:])

    one = qg.compile(prompt, tokens, target="gpu")(tokens).astype(mx.float32)
    program = qg.compile(prompt, tokens, target="gpu", mesh=mesh)
    halves = [n for n in program.plan.graph.nodes if n.op == "distributed.all_sum"]
    assert {ROWS // 2} <= {n.output.shape[-2] for n in halves}
    for _ in range(3):
        away = mx.linalg.norm(program(tokens).astype(mx.float32) - one)
        assert away.item() < 2e-2 * mx.linalg.norm(one).item()


def main(backend: str) -> None:
    mx.set_default_device(mx.gpu)
    mesh = qg.Mesh.of(mx.distributed.init(strict=True, backend=backend), "nccl")
    peers = connect(mesh)
    assert peers is not None, "the ranks reach no memory of each other"
    assert mesh.rank is not None
    exchange_all(peers, mesh.rank)
    print("exchanged", flush=True)
    prompt_in_halves(replace(mesh, overlap=True))
    print("prompted", flush=True)
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
