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
from qgraph.kernels.cuda.kernel import compiled_together
from qgraph.runtime.executable import Executable
from qgraph.runtime.packing import PackCache
from qgraph.runtime.regions.cuda.exchange import exchange
from qgraph.runtime.regions.cuda.peers import Peers, connect
from qgraph.runtime.regions.cuda.pushed import pushed
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


def exchange_all(peers: Peers, rank: int) -> list[tuple[mx.array, mx.array, str]]:
    """Collectives of some sizes and dtypes, one after the other; what they give, and should."""
    last = mx.zeros((COUNTERS,), mx.uint32)
    made = []
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        for count in (2, 4098, 100_002, 1 << 20, 5_000_002, 1 << 23):
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
                made.append((found, right, f"{op} of {count} {dtype}"))
    return made


def push_all(peers: Peers, rank: int) -> list[tuple[mx.array, mx.array, str]]:
    """Sums with a residual and a norm, as `exchange_all`."""
    last = mx.zeros((COUNTERS,), mx.uint32)
    made = []
    for dtype, width in (
        (mx.bfloat16, 4096),
        (mx.bfloat16, 8192),
        (mx.float16, 64),
        (mx.float32, 2052),
    ):
        for rows in (1, 300, 2048):
            keys = mx.random.split(mx.random.key(rows), 4)
            shapes = [(rows, width)] * 3 + [(width,)]
            x, other, h, w = (
                mx.random.normal(shape, key=key).astype(dtype)
                for shape, key in zip(shapes, keys, strict=True)
            )
            total = h + (x.astype(mx.float32) + other.astype(mx.float32)).astype(dtype)
            normed = mx.fast.rms_norm(total, w, 1e-5)
            for _ in range(3):
                found, norm, last = pushed((x, other)[rank], peers, last, h, w, 1e-5)
                about = f"{rows} rows of {width} {dtype}"
                made.append((found, total, f"the sum of {about}"))
                near = mx.allclose(norm, normed, 1e-2, 1e-2)
                made.append((near, mx.array(True), f"the norm of {about}"))
    return made


def a_prompt(mesh: qg.Mesh) -> None:
    """Many rows, in halves if the mesh overlaps, give what one device gives."""
    model = llama(ROWS, hidden=1024, vocab=4096)
    tokens = mx.arange(ROWS)[None] % 4096

    def prompt(tokens: Any) -> Any:
        h, _ = model.forward(tokens, model.empty_cache())
        return model.logits(h[:, -8:])

    one = qg.compile(prompt, tokens, target="gpu")(tokens).astype(mx.float32)
    program = qg.compile(prompt, tokens, target="gpu", mesh=mesh)
    sums = [n for _, n in program.plan.graph.walk() if n.op == "distributed.all_sum"]
    assert (ROWS // 2 in {n.output.shape[-2] for n in sums}) == mesh.overlap
    assert any(n.op == REGION for n in program.plan.graph.nodes)
    for _ in range(3):
        away = mx.linalg.norm(program(tokens).astype(mx.float32) - one)
        assert away.item() < 2e-2 * mx.linalg.norm(one).item()


def main(backend: str) -> None:
    mx.set_default_device(mx.gpu)
    mesh = qg.Mesh.of(mx.distributed.init(strict=True, backend=backend), "nccl")
    peers = connect(mesh)
    assert peers is not None, "the ranks reach no memory of each other"
    assert mesh.rank is not None
    for each in (exchange_all, push_all):
        with compiled_together():
            made = each(peers, mesh.rank)
        for found, right, about in made:
            assert mx.array_equal(found, right).item(), about
        print(each.__name__, flush=True)
    for overlap in (False, True):
        a_prompt(replace(mesh, overlap=overlap))
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
