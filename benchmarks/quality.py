"""Perplexity of SmolLM2-135M by bytes: plain rounding and each method of `Quantize.fit`.

pip install --no-deps gensim     its test data has news in plain English, calibration and test apart
python -m benchmarks.quality                                 every row; hours on two cores
python -m benchmarks.quality --bits 3.5,4.5 --methods plain,all --sequences 12

The float model is the packed one's dequantized weights, in float32.  They lie on a 4-bit grid
in groups of 32, so that format is left out.  Scales are float16: plain 4 bits in groups of 64
take 4.5 bits a number.  The gap is in log perplexity; "closed" is the share of plain's gap that is
gone, at the bytes of plain.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

import qgraph as qg
from benchmarks.machine import describe, save
from qgraph.examples import smollm2_files as files
from qgraph.fitting.weights import Prepared, Walk, live_ranges, prepared
from qgraph.quantization.fitted import Fitted
from qgraph.target import as_target

METHODS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "scales": ("scales",),
    "gptq": ("gptq",),
    "scales+gptq": ("scales", "gptq"),
    "sensitivity": ("sensitivity",),
    "all": ("scales", "gptq", "sensitivity"),
}
FORMATS = [
    {"bits": bits, "group_size": size}
    for bits in (2, 3, 4, 5, 6, 8)
    for size in (32, 64, 128)
    if (bits, size) != (4, 32)
]


def texts() -> tuple[str, str]:
    """Text to fit on and text to test on: the background and the corpus of Lee et al. (2005)."""
    found = importlib.util.find_spec("gensim")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the texts are gensim's: pip install --no-deps gensim")
    folder = Path(next(iter(found.submodule_search_locations))) / "test" / "test_data"
    background, corpus = (
        (folder / name).read_text("latin-1") for name in ("lee_background.cor", "lee.cor")
    )
    return background, corpus


def cut(tokenizer: Any, text: str, count: int, length: int) -> list[mx.array]:
    """`count` stretches of `length` tokens, [1, length] each."""
    ids = tokenizer.encode(text)[: count * length]
    return [mx.array([ids[i : i + length]]) for i in range(0, len(ids) - length + 1, length)]


def log_perplexity(
    found: Prepared, tests: list[mx.array], fitted: Mapping[str, Fitted] | None = None
) -> float:
    """The mean of minus the log-likelihood of each next token, in nats."""
    graph, last = found.graph, live_ranges(found.graph)
    total = count = 0.0
    for ids in tests:
        walk = Walk(found, fitted or {})
        env = walk.start([ids])
        for i, node in enumerate(graph.nodes):
            walk.run(node, env)
            for value in node.inputs:
                if last[value] <= i and isinstance(env.get(value), mx.array):
                    del env[value]
        scores = env[graph.outputs[0]][0, :-1]
        wanted = ids[0, 1:, None]
        likely = mx.take_along_axis(scores, wanted, axis=-1)[:, 0] - mx.logsumexp(scores, axis=-1)
        total -= float(likely.sum())
        count += likely.size
    return total / count


def main(
    bits: Annotated[str, typer.Option(help="bits a number, scales included")] = (
        "2.5,3,3.5,4,4.5,5,5.5"
    ),
    methods: Annotated[str, typer.Option(help="rows")] = ",".join(METHODS),
    sequences: Annotated[int, typer.Option(help="stretches of text to fit on")] = 16,
    length: Annotated[int, typer.Option(help="tokens of each")] = 256,
    tests: Annotated[int, typer.Option(help="stretches to test on")] = 8,
) -> None:
    """Fit and test row by row; each is printed as it is done."""
    found = files.load()
    model = files.mlx_lm_model(files.dequantized(found.weights), found.config)
    background, corpus = texts()
    data = cut(found.tokenizer, background, sequences, length)
    held_out = cut(found.tokenizer, corpus, tests, length)
    graph = qg.from_mlx(model, data[0])
    walked = prepared(graph, qg.Quantize(bits=8, group_size=32))
    whole = log_perplexity(walked, held_out)
    table = Table("bits", "method", "bytes", "perplexity", "gap", "closed", "seconds")
    table.title = f"SmolLM2-135M, float {math.exp(whole):.2f}"
    rows: list[dict[str, Any]] = []
    for budget in map(float, bits.split(",")):
        plain = math.nan
        for name in methods.split(","):
            start = time.perf_counter()
            config = qg.Quantize.fit(
                graph,
                data,
                bits=budget,
                methods=METHODS[name],
                formats=FORMATS,
                result="logits",
                scales=mx.float16,
            )
            took = time.perf_counter() - start
            fitted = config.fitted or {}
            gap = log_perplexity(walked, held_out, fitted) - whole
            plain = gap if name == "plain" else plain
            row = {
                "bits": budget,
                "method": name,
                "bytes": sum(one.nbytes for one in fitted.values()),
                "perplexity": round(math.exp(gap + whole), 2),
                "gap": round(gap, 4),
                "closed": round(1 - gap / plain, 3),
                "seconds": round(took),
            }
            rows.append(row)
            table.add_row(*map(str, row.values()))
            print(row, flush=True)
    Console().print(table)
    about = {"machine": describe(as_target(None)), "float": round(math.exp(whole), 2)}
    save("quality", {**about, "tokens": sequences * length, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
