"""What each process of `test_mesh.py` runs: `python -m tests.support.rank SCENARIO`."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from mlx_lm.models import cache, llama

import qgraph as qg
from qgraph.examples import smollm2_files as files
from qgraph.examples.smollm2 import Generator, Llama
from qgraph.runtime.mesh import watch

PROMPT = [5, 17, 9, 33, 2, 8, 1, 4]


def generator(mesh: qg.Mesh | None, found: files.Model | None = None) -> Generator:
    """Of a toy, or of files that were found."""
    found = found or files.toy()
    return Generator(
        Llama(found.config, found.weights, length=64), chunk=4, target="cpu", mesh=mesh
    )


def small(mesh: qg.Mesh) -> tuple[qg.Program, mx.array]:
    """A program with one all_sum, and what to call it with."""
    w = mx.ones((64, 64)) / 64
    program = qg.compile(lambda x: qg.tanh(qg.tensor(x) @ w) @ w, qg.spec((1, 64)), mesh=mesh)
    return program, mx.ones((1, 64))


def steps(mesh: qg.Mesh, count: int) -> None:
    """So many calls, each waited for."""
    program, x = small(mesh)
    for _ in range(count):
        mx.eval(program(x))


def tiny() -> Any:
    """A model of mlx-lm with three heads of keys and values, packed."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 100}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs("llama", rms_norm_eps=1e-5, **sizes, **heads))
    random = lambda a: mx.random.normal(a.shape) * 0.3 if a.ndim > 1 else a  # noqa: E731
    model.update(tree_map(random, model.parameters()))
    nn.quantize(model, 32, 4)
    return model


def relay(x: Any) -> Any:
    """Rank 0 sends to 1, that one to 2; what comes there is told to all."""
    sent = qg.distributed.send(x * 2, 1)
    again = qg.distributed.send(qg.distributed.recv((2,), mx.float32, 0) + 1, 2)
    return sent, again, qg.distributed.all_sum(qg.distributed.recv((2,), mx.float32, 1))


def main(scenario: str) -> None:
    mx.set_default_device(mx.cpu)
    mesh = qg.Mesh.of(mx.distributed.init(strict=True, backend="ring"))
    print(f"rank {mesh.rank} pid {os.getpid()}", flush=True)
    if scenario == "tokens":
        print("tokens", *generator(mesh).tokens(PROMPT, 8), flush=True)
        # MLX issue 4475 says that of such calls 3 in 100 do not return.
        steps(mesh, 20)
    elif scenario == "smollm2":
        print("tokens", *generator(mesh, files.load()).tokens(PROMPT, 12), flush=True)
    elif scenario == "steps":
        steps(mesh, 1000)
        print("1000 steps returned", flush=True)
    elif scenario == "messages":
        x = mx.array([1.0, 2.0])
        print("on all", qg.compile(relay, x, mesh=mesh)(x)[2].tolist(), flush=True)
        rows = mx.arange(6).reshape(6, 1) * (1.0 + mesh.rank)
        part = qg.compile(lambda x: qg.distributed.sum_scatter(x, 3), rows, mesh=mesh)(rows)
        assert part.tolist() == (6 * mx.arange(6)[2 * mesh.rank :][:2, None]).tolist()
    elif scenario == "model":
        model, spread = tiny(), tiny()
        fast = qg.lm.accelerate(spread, target="cpu", mesh=mesh)
        here, there = cache.make_prompt_cache(model), cache.make_prompt_cache(fast)
        for tokens in ([1, 2, 3, 4, 5, 6, 7], [8], [9]):
            one, other = (m(mx.array([tokens]), cache=c) for m, c in ((model, here), (fast, there)))
            assert mx.max(mx.abs(one - other)).item() < 1e-4 * mx.max(mx.abs(one)).item()
        assert there[0].keys.shape[1] == 2  # of 3 heads, each rank holds two
        # What is packed in parts was let go, and nobody takes what is left for numbers.
        layer = spread.model.layers[0].mlp.up_proj
        assert mx.all(mx.isnan(layer.scales)).item()
        for call in (fast, spread):
            with pytest.raises(qg.errors.MeshError, match="hold parts of it: a call without"):
                call(mx.array([[1]]))
        spread.model.layers[0].mlp.up_proj.scales = mx.ones_like(layer.scales)
        with pytest.raises(qg.errors.MeshError, match="weights changed, but"):
            fast(mx.array([[1]]), cache=there)
    elif scenario == "killed":
        program, x = small(mesh)
        mx.eval(program(x))
        if mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(100_000):
            mx.eval(program(x))
    elif scenario == "stays":
        atexit.register(lambda: print("ends", time.monotonic(), flush=True))
        steps(mesh, 1)
        seen = watch(mesh)
        assert seen is not None
        seen.stay(lambda: print("reads nothing more", flush=True))
        time.sleep(mesh.rank or 0)
        print("done", time.monotonic(), flush=True)
    elif scenario == "raises":
        program, x = small(mesh)
        mx.eval(program(x))
        if mesh.rank == 1:
            raise KeyError("no such layer")
        for _ in range(100_000):
            mx.eval(program(x))
    elif scenario == "differ":
        w = mx.ones((64, 64))
        rows = 1 if mesh.rank == 0 else 2
        qg.compile(lambda x: qg.tanh(qg.tensor(x) @ w) @ w, qg.spec((rows, 64)), mesh=mesh)


if __name__ == "__main__":
    main(sys.argv[1])
