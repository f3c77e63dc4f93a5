"""Models of mlx-lm generating through programs, against mlx-lm itself, by mlx-lm's own loop.

python -m benchmarks.lm                                  eight architectures on the CPU, float32
python -m benchmarks.lm --device gpu --dtype bfloat16 --models llama-8b,qwen3_moe,gemma3_text
python -m benchmarks.lm --models llama --buffer 16384     a step in long, nearly empty buffers

For each model: a step, a prompt and the time to the first token, cold and warm, interleaved in one
run; ratios are of medians.  Weights are random and have four bits.
"""

from __future__ import annotations

import copy
import time
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

import qgraph as qg
from benchmarks.lm_models import MODELS, build
from benchmarks.machine import describe, save
from qgraph.lm.caches.kind import same_length
from qgraph.lm.programs.background import settled
from qgraph.target import as_target


def answer(
    model: Any, prompt: mx.array, count: int, stream: Any, cache: Any = None
) -> tuple[float, list[float], list[int]]:
    """Seconds to the first token, seconds of each after it, and the tokens."""
    from mlx_lm.generate import generate_step

    start, tokens, times = time.perf_counter(), [], []
    for token, _ in generate_step(prompt, model, stream, max_tokens=count, prompt_cache=cache):
        tokens.append(token)
        times.append(time.perf_counter())
    mx.synchronize()
    steps = [b - a for a, b in pairwise(times)]
    return times[0] - start, steps, tokens


def compare(name: str, model: Any, prompt: int, count: int, rounds: int) -> dict[str, Any]:
    """One row: what mlx-lm takes and how many times as fast programs are."""
    runners = {"mlx-lm": model, "qgraph": qg.lm.accelerate(model)}
    ids = mx.random.randint(0, 32768, (max(prompt, 16) + 1,), key=mx.random.key(1))
    short = ids[:17]
    stream = mx.new_thread_local_stream(mx.default_device())
    cold, memory = {}, {}
    tokens: dict[str, list[int]] = {}
    for label, runner in runners.items():
        mx.clear_cache()
        mx.reset_peak_memory()
        cold[label] = answer(runner, short, 2, stream)[0]
        tokens[label] = answer(runner, short, count, stream)[2]
        memory[label] = mx.get_peak_memory()
    first: dict[str, list[float]] = {label: [] for label in runners}
    reads: dict[str, list[float]] = {label: [] for label in runners}
    steps: dict[str, list[float]] = {label: [] for label in runners}
    for _ in range(2):  # programs are made
        settled()
        answer(runners["qgraph"], short, count, stream)
        if prompt:
            answer(runners["qgraph"], ids, 3, stream)
    settled()
    for _ in range(rounds):
        for label, runner in runners.items():
            warm, times, _ = answer(runner, short, count, stream)
            first[label].append(warm)
            steps[label] += times[1:]
            if prompt:
                reads[label].append(answer(runner, ids, 3, stream)[0])
    took = {
        what: {label: median(values[label]) for label in runners}
        for what, values in (("step", steps), ("prompt", reads), ("first", first))
        if values["qgraph"]
    } | {"cold": cold}
    row: dict[str, Any] = {"model": name}
    for what, times in took.items():
        row[f"{what}_ms"] = round(1000 * times["mlx-lm"], 1)
        row[f"{what}_gain"] = round(times["mlx-lm"] / times["qgraph"], 2)
    row["memory"] = round(memory["qgraph"] / memory["mlx-lm"], 2)
    pairs = list(zip(tokens["mlx-lm"], tokens["qgraph"], strict=True))
    row["same_tokens"] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    row["eager"] = dict(runners["qgraph"].qgraph.eager)
    return row


def price_of_length(model: Any, long: int, count: int, rounds: int) -> float:
    """A step with 150 tokens in buffers of `long` positions, in steps with them in 256."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    stream = mx.new_thread_local_stream(mx.default_device())
    short = make_prompt_cache(model)
    answer(model, mx.zeros(150, mx.int32), 1, stream, short)
    caches = {256: short, long: copy.deepcopy(short)}
    times: dict[int, list[float]] = {length: [] for length in caches}
    for turn in range(rounds + 2):
        for length, cache in caches.items():
            tried = copy.deepcopy(cache)
            for c in tried:
                if isinstance(c, KVCache):
                    c.keys, c.values = same_length(c.keys, length), same_length(c.values, length)
            _, steps, _ = answer(model, mx.zeros(1, mx.int32), count, stream, tried)
            if turn > 1:  # programs are made
                times[length] += steps[1:]
        settled()
    return median(times[long]) / median(times[256])


def main(
    models: Annotated[str, typer.Option(help="by commas")] = "",
    device: Annotated[str, typer.Option(help="cpu or gpu")] = "cpu",
    dtype: str = "float32",
    bits: Annotated[int, typer.Option(help="of the weights; 0 for floats")] = 4,
    layers: Annotated[int | None, typer.Option(help="instead of their own number")] = None,
    prompt: Annotated[int, typer.Option(help="tokens; 0 times none but the short one")] = 512,
    tokens: int = 16,
    rounds: int = 3,
    buffer: Annotated[
        int, typer.Option(help="instead: steps with 150 tokens in so long a one, for steps in 256")
    ] = 0,
    name: Annotated[str, typer.Option(help="of the file of results")] = "",
) -> None:
    """Compare steps, prompts, first tokens and memory."""
    target = as_target(device)
    mx.set_default_device(target.device)
    chosen = models.split(",") if models else [n for n in MODELS if "-" not in n]
    rows = []
    console = Console(width=120)
    for label in chosen:
        model = build(label, getattr(mx, dtype), bits or None, layers)
        try:
            if buffer:
                price = price_of_length(qg.lm.accelerate(model), buffer, tokens, rounds)
                console.print(f"{label}: a step in buffers of {buffer} takes {price:.2f} of 256")
            else:
                rows.append(compare(label, model, prompt, tokens, rounds))
                console.print(rows[-1])
        except RuntimeError as error:  # what MLX cannot do on this device
            console.print(f"{label}: {error}")
        del model
        mx.clear_cache()
    if buffer:
        return
    heading = f"{bits} bits, {dtype}, {target}: times as fast as mlx-lm (its ms)"
    table = Table(title=heading, title_justify="left")
    timed = {"step": "step", "prompt": f"prompt of {prompt}", "first": "first token"}
    timed["cold"] = "cold"
    if not prompt:
        del timed["prompt"]
    for column in ("", *timed.values(), "memory", "same"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        parts = [f"{row[f'{what}_gain']} ({row[f'{what}_ms']})" for what in timed]
        table.add_row(row["model"], *parts, str(row["memory"]), f"{row['same_tokens']}/{tokens}")
    console.print(table)
    if name:
        save(name, {"machine": describe(target), "bits": bits, "dtype": dtype, "prompt": prompt,
                    "rows": rows})  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
