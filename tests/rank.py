"""What each process of `tests/test_mesh.py` runs: `python -m tests.rank SCENARIO`."""

from __future__ import annotations

import os
import signal
import sys

import mlx.core as mx

import qgraph as qg
from qgraph.examples import smollm2_files as files
from qgraph.examples.smollm2 import Generator, Llama

PROMPT = [5, 17, 9, 33, 2, 8, 1, 4]


def generator(mesh: qg.Mesh | None) -> Generator:
    found = files.toy()
    return Generator(
        Llama(found.config, found.weights, length=64), chunk=4, target="cpu", mesh=mesh
    )


def main(scenario: str) -> None:
    mx.set_default_device(mx.cpu)
    mesh = qg.Mesh.of(mx.distributed.init(strict=True, backend="ring"))
    print(f"rank {mesh.rank} pid {os.getpid()}", flush=True)
    if scenario == "tokens":
        print("tokens", *generator(mesh).tokens(PROMPT, 8), flush=True)
        # MLX issue 4475 says that of such calls 3 in 100 do not return.
        w = mx.ones((64, 64)) / 64
        program = qg.compile(lambda x: qg.tanh(qg.tensor(x) @ w) @ w, qg.spec((1, 64)), mesh=mesh)
        x = mx.ones((1, 64))
        for _ in range(60):
            x = program(x)
        mx.eval(x)
    elif scenario == "killed":
        run = generator(mesh)
        list(run.tokens(PROMPT, 4))
        if mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(1000):
            list(run.tokens(PROMPT, 8))
    elif scenario == "raises":
        run = generator(mesh)
        list(run.tokens(PROMPT, 4))
        if mesh.rank == 1:
            raise KeyError("no such layer")
        for _ in range(1000):
            list(run.tokens(PROMPT, 8))
    elif scenario == "differ":
        w = mx.ones((64, 64))
        rows = 1 if mesh.rank == 0 else 2
        qg.compile(lambda x: qg.tanh(qg.tensor(x) @ w) @ w, qg.spec((rows, 64)), mesh=mesh)


if __name__ == "__main__":
    main(sys.argv[1])
