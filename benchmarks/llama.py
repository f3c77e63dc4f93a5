"""Tokens per second of llama-shaped models, qgraph against mlx-lm on the same packed weights.

python -m benchmarks.llama                      SmolLM2-135M on the CPU
python -m benchmarks.llama --model llama-8b --device gpu

Decode and prefill are timed interleaved in one run; ratios are of medians.  `llama-8b` and
`llama-1b` have the shapes of Llama-3-8B and Llama-3.2-1B, and random weights of 4 bits.
"""

from __future__ import annotations

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

Times = dict[str, dict[str, list[float]]]
"""Seconds of each round, by runner and part."""

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

    def __init__(self, config: files.Config, weights: files.Weights, prompt: mx.array) -> None:
        self.model = files.mlx_lm_model(weights, config)
        self.prompt = prompt

    def prefill(self) -> mx.array:
        from mlx_lm.models.cache import make_prompt_cache

        self.cache = make_prompt_cache(self.model)
        hidden = self.model.model(self.prompt[:, :-1], cache=self.cache)
        mx.eval(hidden, [c.state for c in self.cache])
        logits = self.model(self.prompt[:, -1:], cache=self.cache)[:, -1]
        self.token = mx.argmax(logits, axis=-1)
        mx.eval(self.token)
        return logits

    def decode(self, count: int) -> list[int]:
        made, token = [], self.token
        for _ in range(count):
            following = mx.argmax(self.model(token[None], cache=self.cache)[:, -1], axis=-1)
            mx.async_eval(following)  # type: ignore[no-untyped-call]
            made.append(int(token.item()))
            token = following
        self.token = token
        mx.eval(token)
        return made


class Ours:
    """The example's model, compiled; decodes `chunk` tokens a call."""

    def __init__(self, model: Llama, prompt: mx.array, chunk: int, **options: Any) -> None:
        self.model, self.prompt, self.chunk = model, prompt, chunk
        self.start = qg.jit(model.prefill, **options)
        self.step = qg.jit(model.decode(chunk), share=self.start, **options)

    def prefill(self) -> mx.array:
        count = mx.array(self.prompt.shape[1], mx.int32)
        logits, self.cache = self.start(self.prompt, count, self.model.empty_cache())
        self.state = mx.argmax(logits[0]).astype(mx.int32), count, mx.random.key(0)
        mx.eval(self.state, self.cache)
        return logits

    def decode(self, count: int) -> list[int]:
        made = []
        for _ in range(count // self.chunk):
            (*self.state, self.cache), tokens = self.step(*self.state, self.cache)
            mx.async_eval(tokens)  # type: ignore[no-untyped-call]
            made.append(tokens)
        return [t for tokens in made for t in tokens.tolist()]


def show(times: Times, prompt: int, tokens: int) -> list[dict[str, Any]]:
    table = Table(title=f"prefill of {prompt} tokens, decode of {tokens}", title_justify="left")
    for heading in ("", "prefill ms", "times mlx-lm", "decode tokens/s", "times mlx-lm"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = []
    base = {part: median(times["mlx-lm"][part]) for part in ("prefill", "decode")}
    for name, parts in times.items():
        prefill, decode = median(parts["prefill"]), median(parts["decode"])
        row = {
            "name": name,
            "prefill_ms": round(1000 * prefill, 2),
            "prefill_gain": round(base["prefill"] / prefill, 3),
            "tokens_per_s": round(tokens / decode, 2),
            "decode_gain": round(base["decode"] / decode, 3),
        }
        table.add_row(*(str(v) for v in row.values()))
        rows.append(row)
    Console(width=100).print(table)
    return rows


def main(
    model: Annotated[str, typer.Option(help="smollm2, llama-8b or llama-1b")] = "smollm2",
    device: Annotated[str, typer.Option(help="cpu or gpu")] = "cpu",
    layers: Annotated[int, typer.Option(help="0 for all of them")] = 0,
    prompt: Annotated[int, typer.Option(help="tokens")] = 64,
    tokens: int = 32,
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
    length = 16 * -(-(prompt + tokens) // 16)  # each round begins with the prompt
    llama = Llama(config, weights, length=length, dtype=dtype)
    ids = mx.random.randint(0, config.vocab, (1, prompt), key=mx.random.key(1))
    runners: dict[str, Any] = {
        "mlx-lm": MlxLm(config, weights, ids),
        "qgraph": Ours(llama, ids, chunk, target=target),
    }
    for left_out in filter(None, without.split(",")):
        passes = [p for p in default_passes(target) if p.name != left_out]
        runners[f"without {left_out}"] = Ours(llama, ids, chunk, target=target, passes=passes)
    logits = {name: runner.prefill().astype(mx.float32) for name, runner in runners.items()}
    for label, ours in logits.items():
        error = mx.linalg.norm(ours - logits["mlx-lm"]) / mx.linalg.norm(logits["mlx-lm"])
        typer.echo(f"{label}: logits within {error.item():.1e} of mlx-lm's")
    for runner in runners.values():
        runner.decode(chunk)
    times: Times = {label: {"prefill": [], "decode": []} for label in runners}
    for _ in range(rounds):
        for label, runner in runners.items():
            times[label]["prefill"].append(once(runner.prefill))
            times[label]["decode"].append(once(partial(runner.decode, tokens)))
    rows = show(times, prompt, tokens)
    bandwidth, _ = floors(target)
    packed = sum(w.nbytes for n, w in weights.items() if "embed" not in n or config.tied)
    typer.echo(f"the bytes alone: {bandwidth / packed:.0f} tokens/s at {bandwidth / 1e9:.0f} GB/s")
    if name:
        save(name, {"machine": describe(target), "model": model, "layers": config.layers,
                    "prompt": prompt, "tokens": tokens, "rows": rows})  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
