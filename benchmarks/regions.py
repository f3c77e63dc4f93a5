"""Kinds of work on a CPU: as a region, and as a program would run them, against MLX.

python -m benchmarks.regions                  all kinds
python -m benchmarks.regions --kinds scan,sum  those whose names hold one of the words

`region` is the engine whatever it costs, `program` what `qg.compile` chooses, which may leave a
stretch to MLX; both are given as milliseconds and as a ratio to MLX compiled, medians of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

import qgraph as qg
from benchmarks.machine import describe, on_cpu, save
from qgraph.passes import FormRegions
from qgraph.target import as_target
from qgraph.timing import Timing, interleaved, once, paired_ratio

Function = Callable[..., Any]
"""Of a name space of operations, `mlx.core` or `qgraph`, and of arrays."""

LEAST = 0.02
"""Seconds that a candidate runs in a turn: the engine's threads spin for 2 ms after a call, which
would disturb the next one."""

SMALL, LARGE = (64, 512), (1024, 2048)


def _chain(ops: Any, x: Any) -> Any:
    return (x * 2 + 1) * x - x * 0.5


def _functions(ops: Any, x: Any) -> Any:
    return ops.tanh(x) * ops.exp(-x * x)


def _rows(ops: Any, x: Any) -> Any:
    return ops.softmax(x - x.mean(axis=-1, keepdims=True), axis=-1)


KINDS: dict[str, Function] = {
    "chain": _chain,
    "chain, transposed": lambda ops, x: ops.transpose(x) * 2 + 1,
    "chain, both ways": lambda ops, x: x[:, : x.shape[0]] + ops.transpose(x[:, : x.shape[0]]),
    "functions": _functions,
    "softmax": _rows,
    "sum": lambda ops, x: x.sum(axis=-1),
    "sum, first axis": lambda ops, x: x.sum(axis=0),
    "sum, all": lambda ops, x: x.sum(),
    "sum of integers": lambda ops, x: x.astype(mx.int32).sum(axis=-1),
    "max, first axis": lambda ops, x: x.max(axis=0),
    "argmax": lambda ops, x: ops.argmax(x, axis=-1),
    "var, first axis": lambda ops, x: ops.var(x, axis=0),
    "cumsum": lambda ops, x: ops.cumsum(x, axis=-1),
    "cumsum, first axis": lambda ops, x: ops.cumsum(x, axis=0),
    "cummax": lambda ops, x: ops.cummax(x, axis=-1),
    "logcumsumexp": lambda ops, x: ops.logcumsumexp(x, axis=-1),
    "sort": lambda ops, x: ops.sort(x, axis=-1),
    "topk": lambda ops, x: ops.topk(x, 8, axis=-1),
    "copy of a transpose": lambda ops, x: ops.contiguous(ops.transpose(x)),
    "concatenate": lambda ops, x: ops.concatenate([x, x * 2], axis=-1),
    "take rows": lambda ops, x: ops.take(x, mx.arange(0, x.shape[0], 3), axis=0),
    "take columns": lambda ops, x: ops.take(x, mx.arange(0, x.shape[1], 3), axis=1),
    "random": lambda ops, x: ops.random.uniform(shape=x.shape, key=mx.random.key(1)),
}
CONVOLUTIONS: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...]]] = {
    "conv1d, depthwise": (
        lambda ops, x, w: ops.conv1d(x, w, padding=3, groups=x.shape[-1]),
        (1, 256, 512), (512, 4, 1),
    ),
    "conv2d, 3 by 3": (
        lambda ops, x, w: ops.conv2d(x, w, padding=1), (4, 32, 32, 32), (64, 3, 3, 32),
    ),
    "conv2d, 1 by 1": (lambda ops, x, w: ops.conv2d(x, w), (4, 32, 32, 64), (128, 1, 1, 64)),
    "conv2d, few channels": (
        lambda ops, x, w: ops.conv2d(x, w, stride=2, padding=3), (1, 96, 96, 3), (32, 7, 7, 3),
    ),
}  # fmt: skip


def cases() -> Iterator[tuple[str, Function, list[mx.array]]]:
    """Names, functions and their arrays."""
    for name, function in KINDS.items():
        for shape in (SMALL, LARGE):
            x = mx.random.normal(shape, key=mx.random.key(0))
            yield f"{name}, {' by '.join(map(str, shape))}", function, [x]
    for name, (function, *shapes) in CONVOLUTIONS.items():
        keys = mx.random.split(mx.random.key(0), len(shapes))
        yield (
            name,
            function,
            [mx.random.normal(s, key=k) for s, k in zip(shapes, keys, strict=True)],
        )


def measured(function: Function, arrays: list[mx.array], rounds: int) -> dict[str, float]:
    mx.eval(arrays)
    specs = [qg.spec(a.shape, a.dtype) for a in arrays]
    ours = partial(function, qg)
    everywhere = [FormRegions(as_target("cpu"), everywhere=True)]
    ways: dict[str, Function] = {
        "region": qg.compile(ours, *specs, target="cpu", passes=everywhere),
        "program": qg.compile(ours, *specs, target="cpu"),
        "MLX": mx.compile(partial(function, mx)),
    }
    runs = {name: (lambda way=way: mx.eval(way(*arrays))) for name, way in ways.items()}
    for run in runs.values():  # compiles
        run()
    inner = max(1, int(LEAST / once(runs["MLX"])))
    timings: dict[str, Timing] = {}
    result: dict[str, float] = {}
    for name in ("program", "region"):  # each against MLX alone
        pair = {name: runs[name], "MLX": runs["MLX"]}
        timings |= interleaved(pair, repeats=rounds, warmup=1, inner=inner)
        result[f"{name}_of_MLX"] = round(paired_ratio(timings[name], timings["MLX"]), 3)
    result |= {f"{name}_ms": round(1e3 * t.median, 4) for name, t in timings.items()}
    return result


def table(results: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="milliseconds, and ours over MLX's", title_justify="left")
    for heading in ("", "MLX", "region", "of MLX", "program", "of MLX"):
        made.add_column(heading, justify="right" if heading else "left")
    for r in results:
        numbers = (r["MLX_ms"], r["region_ms"], r["region_of_MLX"], r["program_ms"],
                   r["program_of_MLX"])  # fmt: skip
        made.add_row(r["kind"], *(f"{n:.3g}" for n in numbers))
    return made


def main(
    kinds: Annotated[str, typer.Option(help="words of the kinds to run, by commas")] = "",
    rounds: int = 9,
    out: Annotated[str, typer.Option(help="name of a file in benchmarks/results")] = "",
) -> None:
    """Print the table, and keep it as JSON with `--out`."""
    words = [w for w in kinds.split(",") if w] or [""]
    results: list[dict[str, Any]] = []
    with on_cpu():
        for name, function, arrays in cases():
            if any(word in name for word in words):
                results.append({"kind": name, **measured(function, arrays, rounds)})
    Console(width=100).print(table(results))
    if out:
        save(out, {**describe(as_target("cpu")), "rows": results})


if __name__ == "__main__":
    typer.run(main)
