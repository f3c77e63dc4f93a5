"""One graph over several devices: milliseconds of a prompt and of a token, memory of a rank.

    python -m benchmarks.mesh                                two processes of this machine's CPU
    python -m benchmarks.mesh --model llama-8b --device gpu   one GPU and two, over NCCL
    python -m benchmarks.mesh --model llama-70b --device gpu --part token

Each line is a run of its own, of as many processes as ranks, over the same random weights of 4
bits, which are made lazily, as those of a file are read.  A rank holds its part; its peak is that
and the making of one weight.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

import qgraph as qg
from benchmarks.llama import LLAMA_8B
from benchmarks.machine import describe
from qgraph.examples import smollm2_files as files
from qgraph.examples.smollm2 import Llama
from qgraph.runtime.executable import Executable
from qgraph.runtime.packing import PackCache
from qgraph.target import as_target

MODELS = {
    "small": replace(LLAMA_8B, layers=4, hidden=1024, ffn=2816, heads=16, kv_heads=4, head_dim=64,
                     vocab=32000),
    "llama-8b": LLAMA_8B,
    "llama-70b": replace(LLAMA_8B, layers=80, hidden=8192, ffn=28672, heads=64),
}  # fmt: skip
PARTS = ("prompt", "token")
ROUNDS = {"prompt": 5, "token": 64}
RUNS = 3


def lazy_weights(config: files.Config, dtype: mx.Dtype) -> files.Weights:
    """Packed weights of 4 bits that are computed when they are first read."""
    matrices, norms = files.parts(config)
    weights = {f"{name}.weight": mx.ones(config.hidden, dtype) for name in norms}
    key = mx.random.key(0)
    for number, (name, (n, k)) in enumerate(matrices.items()):
        rows, groups = math.gcd(n, 256), k // config.group_size
        # The same random rows again and again, each time with other bits turned.
        turned = mx.arange(n // rows, dtype=mx.uint32)[:, None, None] * 0x9E3779B1 + number
        some = mx.random.randint(0, 1 << 16, (rows, k // 4), mx.uint16, key=key).view(mx.uint32)
        weights[f"{name}.weight"] = (some ^ turned).reshape(n, k // 8)
        scales = mx.random.uniform(0.5, 1.5, (rows, groups), key=key) * (0.2 * k**-0.5)
        scales = mx.broadcast_to(scales, (n // rows, rows, groups)).reshape(n, groups)
        weights[f"{name}.scales"] = scales.astype(dtype)
        weights[f"{name}.biases"] = (-7.5 * scales).astype(dtype)
    return weights


class Rank:
    """What one process measures: a part of generating, through a program that keeps its caches."""

    def __init__(self, config: files.Config, part: str, prompt: int, mesh: qg.Mesh) -> None:
        dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu, 0) else mx.bfloat16
        llama = Llama(config, lazy_weights(config, dtype), length=2 * prompt, dtype=dtype)
        count = prompt if part == "prompt" else 1
        fn = self._prompt if part == "prompt" else self._token
        self.llama = llama
        self.given = [mx.ones((1, count), mx.int32), mx.array(prompt, mx.int32)]
        self.last = self.given[0]
        self.cache = qg.tree.flatten((llama.empty_cache(), {}), static=True)[0]
        graph = qg.trace(fn, *self.given, llama.empty_cache(), name=part)
        llama.weights.clear()  # the graph alone holds them, until they are packed
        states = [(2 + i, 1 + i) for i in range(len(self.cache))]
        plan = qg.optimize(graph, mesh=mesh, states=states, check=False)
        self.talks = sum("distributed.all" in n.op for _, n in plan.graph.walk())
        self.program = Executable(
            plan.graph, plan.target, PackCache(), release=True, progress=lambda *_: None,
            states=states,
        )  # fmt: skip

    def _prompt(self, tokens: Any, count: Any, cache: Any) -> Any:
        h, cache = self.llama.forward(tokens, cache)
        return qg.argmax(self.llama.logits(h[:, -1:]), axis=-1), cache

    def _token(self, token: Any, position: Any, cache: Any) -> Any:
        h, cache = self.llama.forward(token, cache, position)
        return qg.argmax(self.llama.logits(h), axis=-1), cache

    def round(self) -> None:
        given = self.program.in_parts([*self.given, *self.cache])
        self.cache = []
        result, *self.cache = self.program.take(given)
        self.given[0] = result.astype(mx.int32) if self.given[0].size == 1 else self.given[0]
        # The next round is prepared while this one runs, as mlx-lm does.
        mx.async_eval(result, self.cache)  # type: ignore[no-untyped-call]
        mx.eval(self.last)
        self.last = result

    def measure(self, rounds: int) -> float:
        """Seconds of a round, of the fastest of some runs: a host runs ahead of its GPU in one."""
        found = []
        for run in range(RUNS + 1):
            start = time.perf_counter()
            for _ in range(rounds if run else 2):
                self.round()
            mx.eval(self.last, self.cache)
            found.append((time.perf_counter() - start) / rounds)
        return min(found[1:])


def rank_main(config: files.Config, part: str, prompt: int, ranks: int, overlap: bool) -> None:
    """One process; rank 0 prints what it measured."""
    mesh = qg.Mesh(1)
    if ranks > 1:
        mesh = qg.Mesh.of(mx.distributed.init(), overlap=overlap)
    start = time.perf_counter()
    rank = Rank(config, part, prompt, mesh)
    made = time.perf_counter() - start
    held, peak = mx.get_active_memory(), mx.get_peak_memory()
    seconds = rank.measure(ROUNDS[part])
    if not mesh.rank:
        found = {
            "ms": 1000 * seconds,
            "held": held,
            "peak": peak,
            "talks": rank.talks,
            "made": made,
        }
        print("measured", json.dumps(found), flush=True)


def launch(
    model: str, layers: int, part: str, prompt: int, ranks: int, device: str, *ways: str
) -> dict[str, float]:
    """Run as many processes as ranks, and what rank 0 measured."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.mesh", "--one-of", str(ranks), "--model", model]
    command += ["--part", part, "--prompt", str(prompt), "--device", device]
    command += ["--layers", str(layers), *ways]
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder, "hosts.json")
        hosts.write_text(json.dumps([[f"127.0.0.1:{port + i}"] for i in range(ranks)]))
        processes = []
        for rank in range(ranks):
            env = {**os.environ, "MLX_RANK": str(rank)}
            if device == "gpu":
                env |= {"MLX_WORLD_SIZE": str(ranks), "NCCL_HOST_IP": "127.0.0.1",
                        "NCCL_PORT": str(port), "CUDA_VISIBLE_DEVICES": str(rank),
                        "NCCL_GRAPH_MIXING_SUPPORT": "0"}  # fmt: skip
            else:
                env["MLX_HOSTFILE"] = str(hosts)
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        texts = [process.communicate()[0] for process in processes]
    line = next((s for s in texts[0].splitlines() if s.startswith("measured ")), None)
    if line is None:
        raise SystemExit(f"{ranks} ranks did not finish: {texts}")
    found: dict[str, float] = json.loads(line.removeprefix("measured "))
    return found


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "small",
    device: Annotated[str, typer.Option(help="cpu or gpu.")] = "cpu",
    ranks: Annotated[int, typer.Option(help="How many to compare with one.")] = 2,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, and in the cache.")] = 128,
    part: Annotated[str, typer.Option(help="prompt, token or both.")] = "both",
    layers: Annotated[int, typer.Option(help="So many; by default the model's.")] = 0,
    overlap: Annotated[bool, typer.Option(help="Rows of a prompt in halves.")] = False,
    one_of: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Measure one device and several in one run."""
    mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)
    config = replace(MODELS[model], layers=layers or MODELS[model].layers)
    if one_of:
        rank_main(config, part, prompt, one_of, overlap)
        return
    ways = ["--overlap"] * overlap
    table = Table(
        "part", "ranks", "ms", "times one", "held MB", "of one", "peak MB", "collectives", "made s"
    )
    for each in PARTS if part == "both" else (part,):
        one = launch(model, config.layers, each, prompt, 1, device)
        several = launch(model, config.layers, each, prompt, ranks, device, *ways)
        for count, found in ((1, one), (ranks, several)):
            table.add_row(
                each, str(count), f"{found['ms']:.2f}", f"{one['ms'] / found['ms']:.2f}",
                f"{found['held'] / 1e6:.0f}", f"{found['held'] / one['held']:.2f}",
                f"{found['peak'] / 1e6:.0f}",
                f"{found['talks']:.0f}", f"{found['made']:.0f}",
            )  # fmt: skip
    console = Console(width=100)
    about = describe(as_target(device))
    where = about["device"] or about["arch"]
    console.print(f"{model}, {config.layers} layers, 4 bits, {prompt} tokens, {where}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
