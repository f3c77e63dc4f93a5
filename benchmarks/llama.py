"""Tokens per second of llama-shaped models, qgraph against mlx-lm on the same packed weights.

python -m benchmarks.llama                      SmolLM2-135M on the CPU
python -m benchmarks.llama --model llama-8b --device gpu --batch 1,4,16

Decode and prefill are timed interleaved in one run; ratios are of medians.  `llama-8b` and
`llama-1b` have the shapes of Llama-3-8B and Llama-3.2-1B, and random weights of 4 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

import qgraph as qg
from benchmarks.machine import describe, floors, save
from qgraph.compiler.pipeline import default_passes
from qgraph.examples import smollm2_files as files
from qgraph.examples.smollm2 import Llama
from qgraph.target import as_target
from qgraph.timing import once

PARTS = ("prefill", "decode")
Times = dict[tuple[str, int], dict[str, list[float]]]
"""Seconds of each round, by runner and batch, and part."""

LLAMA_8B = files.Config(
    layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256,
    rms_eps=1e-5, rope_base=500000.0, context=8192, bos_id=0, eos_id=-1, tied=False,
    rope_traditional=False, group_size=64,
)  # fmt: skip

LLAMA_1B = files.Config(
    layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, head_dim=64, vocab=128256,
    rms_eps=1e-5, rope_base=500000.0, context=8192, bos_id=0, eos_id=-1, tied=True,
    rope_traditional=False, group_size=64,
)  # fmt: skip
SHAPES = {"llama-8b": LLAMA_8B, "llama-1b": LLAMA_1B}


def random_weights(config: files.Config, dtype: mx.Dtype) -> files.Weights:
    """Packed weights of 4 bits, groups as in `config`: random numbers of the size models have."""
    matrices, norms = files.parts(config)
    weights = {f"{name}.weight": mx.ones(config.hidden, dtype) for name in norms}
    for name, (n, k) in matrices.items():
        numbers = mx.random.randint(0, 1 << 16, (n, k // 8, 2), mx.uint32)
        weights[f"{name}.weight"] = numbers[..., 0] | numbers[..., 1] << 16
        scales = mx.random.uniform(0.5, 1.5, (n, k // config.group_size)) * (0.2 * k**-0.5)
        weights[f"{name}.scales"] = scales.astype(dtype)
        weights[f"{name}.biases"] = (-7.5 * scales).astype(dtype)
        mx.eval([weights[f"{name}.{part}"] for part in ("weight", "scales", "biases")])
    return weights


class MlxLm:
    """mlx-lm's model, driven as mlx-lm drives it: the next step starts before a token is read."""

    def __init__(self, config: files.Config, weights: files.Weights) -> None:
        self.model = files.mlx_lm_model(weights, config)

    def prefill(self, prompt: mx.array) -> mx.array:
        from mlx_lm.models.cache import make_prompt_cache

        self.cache = make_prompt_cache(self.model)
        hidden = self.model.model(prompt[:, :-1], cache=self.cache)
        mx.eval(hidden, [c.state for c in self.cache])
        logits: mx.array = self.model(prompt[:, -1:], cache=self.cache)[:, -1]
        self.token = mx.argmax(logits, axis=-1)
        mx.eval(self.token)
        return logits

    def decode(self, count: int) -> None:
        for _ in range(count):
            logits = self.model(self.token[:, None], cache=self.cache)[:, -1]
            following = mx.argmax(logits, axis=-1)
            mx.async_eval(following)  # type: ignore[no-untyped-call]
            self.token.tolist()
            self.token = following
        mx.eval(self.token)


class Ours:
    """The example's model, compiled; decodes `chunk` tokens a call, driven in the same way."""

    def __init__(self, model: Llama, chunk: int, **options: Any) -> None:
        self.model, self.chunk = model, chunk
        self.start = qg.jit(model.prefill, **options)
        self.step = qg.jit(model.decode(chunk), share=self.start, **options)

    def prefill(self, prompt: mx.array) -> mx.array:
        batch, length = prompt.shape
        count = mx.array(length, mx.int32)
        logits, self.cache = self.start(prompt, count, self.model.empty_cache(batch))
        self.state = mx.argmax(logits, axis=-1).astype(mx.int32), count, mx.random.key(0)
        mx.eval(self.state, self.cache)
        return logits

    def decode(self, count: int) -> None:
        before = None
        for _ in range(count // self.chunk):
            (*self.state, self.cache), tokens = self.step(*self.state, self.cache)
            mx.async_eval(tokens, self.state)  # type: ignore[no-untyped-call]
            if before is not None:
                before.tolist()
            before = tokens
        mx.eval(before, self.state, self.cache)


def show(times: Times, prompt: int, tokens: int, batches: Sequence[int]) -> list[dict[str, Any]]:
    """A table, and its rows for the file of results; of `times` by runner, batch and part."""
    table = Table(title=f"prefill of {prompt} tokens, decode of {tokens}", title_justify="left")
    headings = ("", "batch", "prefill ms", "times mlx-lm", "decode tokens/s", "times mlx-lm",
                "times its first batch")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    for batch in batches:
        base = {part: median(times["mlx-lm", batch][part]) for part in PARTS}
        for name in dict.fromkeys(name for name, _ in times):
            prefill, decode = (median(times[name, batch][part]) for part in PARTS)
            rate = batch * tokens / decode
            row = {
                "name": name,
                "batch": batch,
                "prefill_ms": round(1000 * prefill, 2),
                "prefill_gain": round(base["prefill"] / prefill, 3),
                "tokens_per_s": round(rate, 2),
                "decode_gain": round(base["decode"] / decode, 3),
                "batch_gain": round(rate / first.setdefault(name, rate), 2),
            }
            table.add_row(*(str(v) for v in row.values()))
            rows.append(row)
    Console(width=100).print(table)
    return rows


def distance(ours: mx.array, theirs: mx.array) -> float:
    return float((mx.linalg.norm(ours - theirs) / mx.linalg.norm(theirs)).item())


def main(
    model: Annotated[str, typer.Option(help="smollm2, llama-8b or llama-1b")] = "smollm2",
    device: Annotated[str, typer.Option(help="cpu or gpu")] = "cpu",
    layers: Annotated[int, typer.Option(help="0 for all of them")] = 0,
    prompt: Annotated[int, typer.Option(help="tokens")] = 64,
    batch: Annotated[str, typer.Option(help="sequences side by side, such as 1,4,16")] = "1",
    tokens: Annotated[int, typer.Option(help="that are decoded in a round")] = 128,
    chunk: Annotated[int, typer.Option(help="tokens a call")] = 8,
    rounds: int = 3,
    without: Annotated[str, typer.Option(help="passes to leave out in turn, by commas")] = "",
    name: Annotated[str, typer.Option(help="of the file of results")] = "",
) -> None:
    """Compare decode and prefill."""
    if tokens % chunk:
        raise typer.BadParameter(f"{tokens} tokens are not chunks of {chunk}")
    target = as_target(device)
    mx.set_default_device(target.device)
    if model == "smollm2":
        found = files.load()
        config, weights, dtype = found.config, found.weights, mx.float32
    else:
        config, dtype = SHAPES[model], mx.bfloat16
        config = replace(config, layers=layers or config.layers)
        weights = random_weights(config, dtype)
    length = 16 * -(-(prompt + chunk + tokens) // 16)  # each round begins with the prompt
    llama = Llama(config, weights, length=length, dtype=dtype)
    runners: dict[str, Any] = {
        "mlx-lm": MlxLm(config, weights),
        "qgraph": Ours(llama, chunk, target=target),
    }
    for left_out in filter(None, without.split(",")):
        passes = [p for p in default_passes(target) if p.name != left_out]
        runners[f"without {left_out}"] = Ours(llama, chunk, target=target, passes=passes)
    batches = [int(each) for each in batch.split(",")]
    times: Times = {}
    for size in batches:
        ids = mx.random.randint(0, config.vocab, (size, prompt), key=mx.random.key(1))
        logits = {label: r.prefill(ids).astype(mx.float32) for label, r in runners.items()}
        for label, runner in runners.items():
            error = distance(logits[label], logits["mlx-lm"])
            typer.echo(f"batch {size}, {label}: logits within {error:.1e} of mlx-lm's")
            runner.decode(2 * chunk)
            times[label, size] = {part: [] for part in PARTS}
        for _ in range(rounds):
            for label, runner in runners.items():
                times[label, size]["prefill"].append(once(partial(runner.prefill, ids)))
                times[label, size]["decode"].append(once(partial(runner.decode, tokens)))
    rows = show(times, prompt, tokens, batches)
    bandwidth, _ = floors(target)
    packed = sum(w.nbytes for n, w in weights.items() if "embed" not in n or config.tied)
    typer.echo(f"the bytes alone: {bandwidth / packed:.0f} steps/s at {bandwidth / 1e9:.0f} GB/s")
    if name:
        save(name, {"machine": describe(target), "model": model, "layers": config.layers,
                    "prompt": prompt, "tokens": tokens, "rows": rows})  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
