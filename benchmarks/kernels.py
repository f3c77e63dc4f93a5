"""Kernels for quantized matmuls: which is fastest where, and does qgraph choose it?

python -m benchmarks.kernels             what the shipped table and the cost model choose, checked
python -m benchmarks.kernels --table F   measure the table that ships with the package

On GPUs times are those of products that wait for one another, launches included, the host ahead.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import describe, floors, save
from qgraph.kernels import Problem, candidates
from qgraph.kernels.choice.cost import CostTable
from qgraph.kernels.choice.measuring import measure
from qgraph.kernels.choice.tuner import choose, estimate
from qgraph.target import Target, as_target
from qgraph.types import DTYPES, SHORT_NAMES

MODES = {
    **{f"affine{bits}": ("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": ("mxfp4", 4, 32),
    "nvfp4": ("nvfp4", 4, 16),
    "mxfp8": ("mxfp8", 8, 32),
}
COMMON = "affine4,affine8,mxfp4,nvfp4,mxfp8"
ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 2048]
SIZES = {
    "cpu": ["576x576", "2048x2048", "4096x4096"],
    "cuda": ["2048x2048", "4096x4096", "14336x4096", "4096x14336", "151936x896", "1536x4096"],
}
ODD_SIZES = ["1500x4096", "4x4096", "2048x2080"]
"""N not a multiple of 8, N below 8 (MLX issue 4498), K not a multiple of 64."""
EXPERTS = {"cpu": ["8x1024x2048"], "cuda": ["8x14336x4096"]}
"""Experts, N and K of a `gather_qmm` whose rows go to experts at random (MLX issue 4339)."""

NEAR_BEST, NEAR_MODEL = 1.05, 1.25
"""How far from the best kernel a choice may be, and a kernel's model from what it takes."""

UNLIMITED = 1 << 60
KEYS = ("m", "n", "k", "mode", "bits", "transpose", "experts")


@dataclass
class Grid:
    """Problems, those of one weight by growing rows."""

    rows: list[int]
    sizes: list[str]
    modes: list[str]
    dtypes: list[str]

    def problems(self, target: Target) -> Iterator[list[Problem]]:
        for dtype, mode, size in itertools.product(self.dtypes, self.modes, self.sizes):
            *experts, n, k = map(int, size.split("x"))
            name, bits, group = MODES[mode]
            if k % group == 0:
                first = Problem(
                    0, n, k, DTYPES[dtype], name, bits, group, backend=target.backend,
                    arch=target.arch, cores=target.cores, experts=sum(experts),
                )  # fmt: skip
                yield [first.replace(m=m) for m in self.rows]


def asked(problem: Problem, only: frozenset[str]) -> list[str]:
    """The candidates for a problem, or those of them that are in `only`."""
    return [n for n in candidates(problem, budget=UNLIMITED) if not only or n in only]


def _nothing_to_measure(grid: Grid, target: Target, only: frozenset[str]) -> str:
    every = [problem for column in grid.problems(target) for problem in column]
    if not every:
        return "no size has a K that is a multiple of its mode's group"
    names = dict.fromkeys(name for problem in every for name in asked(problem, frozenset()))
    return f"--only {','.join(sorted(only))}: none applies here; those that do: {', '.join(names)}"


@dataclass
class Bench:
    """Measures problem after problem; what a slow candidate takes at more rows is extrapolated.

    Attributes:
        limit: seconds; a candidate predicted to take longer for one call is not run.
        only: the kernels to measure; all that apply if there are none.
    """

    target: Target
    limit: float
    repeats: int
    rates: tuple[float, float]
    only: frozenset[str] = frozenset()
    before: dict[str, tuple[int, float]] = field(default_factory=dict)

    def row(self, problem: Problem) -> dict[str, Any]:
        names = asked(problem, self.only)
        expected = {name: seconds * problem.m / m for name, (m, seconds) in self.before.items()}
        limit = max(self.limit, 2 * min(expected.values(), default=0))
        predicted = {name: 1e6 * s for name, s in expected.items() if s > limit}
        wanted = [name for name in names if name not in predicted]
        timings = measure(problem, wanted, repeats=self.repeats, target=self.target)
        for name, timing in timings.items():
            self.before[name] = (problem.m, timing.best)
        bandwidth, rate = self.rates
        return {
            "problem": str(problem),
            **{key: getattr(problem, key) for key in KEYS},
            "dtype": SHORT_NAMES[problem.dtype],
            "us": {name: round(1e6 * t.median, 1) for name, t in timings.items()},
            "best_us": {name: round(1e6 * t.best, 1) for name, t in timings.items()},
            "spread": {name: round(t.spread, 3) for name, t in timings.items()},
            "extrapolated_us": {n: round(us, 1) for n, us in predicted.items() if n in names},
            "model_us": _models(problem, timings),
            "floor_us": {
                "bytes": round(1e6 * problem.moved_bytes / bandwidth, 1),
                "operations": round(1e6 * problem.flops / rate, 1),
            },
            "chosen": _decisions(problem),
            "free": [name for name in timings if name in candidates(problem)],
        }


def _models(problem: Problem, names: Iterable[str]) -> dict[str, float]:
    """Microseconds by the models that kernels have, where nothing was measured."""
    nothing = CostTable({"backend": problem.backend, "cores": problem.cores}, {}, {})
    found = {name: estimate(name, problem, nothing) for name in names}
    return {name: round(us, 1) for name, us in found.items() if us is not None}


def _decisions(problem: Problem) -> dict[str, list[str]]:
    """What qgraph chooses without a cache: with no budget and with any, kernel and source."""
    free = choose(problem, cache=NO_CACHE)
    dense = choose(problem, budget=UNLIMITED, cache=NO_CACHE)
    return {"packed": [free.kernel, free.source], "dense": [dense.kernel, dense.source]}


class _NoCache:
    """Stands for the user's cache, so that a benchmark tells what ships."""

    def get(self, problem: Problem) -> dict[str, float]:
        return {}


NO_CACHE: Any = _NoCache()


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="quantized matmul, ratios of one run", title_justify="left")
    for heading in ("problem", "chosen", "by"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "µs", "plain / it", "it / best", "best", "model / it", "dense", "bytes", "operations"
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    console.print(
        "it / best: over the fastest kernel without extra memory; dense: the best with any budget; "
        "bytes, operations: floors in µs; ~ extrapolated by rows, not run"
    )
    for line in verdicts(rows):
        console.print(line)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """How many choices are near the best kernel, and how many times near the kernels' models."""
    every = [(row["problem"], summary(row)) for row in rows]
    regrets = [(s["regret"], f"{s['chosen']} for {problem}") for problem, s in every if s["us"] > 0]
    with_budget = [
        (row["us"][chosen] / min(row["us"].values()), f"{chosen} for {row['problem']}")
        for row in rows
        if (chosen := row["chosen"]["dense"][0]) in row["us"]
    ]
    misses = [
        (max(model / row["us"][name], row["us"][name] / model), f"{name} for {row['problem']}")
        for row in rows
        for name, model in row["model_us"].items()
    ]
    told = [
        ("chosen kernel over the best", regrets, NEAR_BEST),
        ("chosen with any budget over the best of all", with_budget, NEAR_BEST),
        ("model and measurement apart", misses, NEAR_MODEL),
    ]
    return [_verdict(*each) for each in told if each[1]]


def _verdict(what: str, found: list[tuple[float, str]], limit: float) -> str:
    worst = ", ".join(f"{ratio:.2f} {name}" for ratio, name in sorted(found, reverse=True)[:3])
    within = sum(ratio <= limit for ratio, _ in found)
    return f"{what}: {within} of {len(found)} within {limit}; farthest {worst}"


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Of one row: the chosen kernel's time, plain's over it, and its own over the best one's.

    The best is that of those that need no budget, if any was measured.  NaN where one of them was
    not measured.
    """
    us: dict[str, float] = row["us"]
    everything = {**us, **row["extrapolated_us"]}
    chosen, source = row["chosen"]["packed"]
    best = min(row["free"] or us, key=us.__getitem__)
    plain = "gather_qmm" if row["experts"] else "qmm"
    its = everything.get(chosen, math.nan)
    return {
        "chosen": chosen,
        "source": source,
        "us": its,
        "gain": everything.get(plain, math.nan) / its,
        "extrapolated": plain in row["extrapolated_us"],
        "regret": its / us[best],
        "best": best,
        "model": row["model_us"].get(chosen, math.nan) / its,
        "dense_us": min(us.values()),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    s = summary(row)
    cells = [
        row["problem"],
        s["chosen"],
        s["source"],
        f"{s['us']:.0f}",
        f"{'~' if s['extrapolated'] else ''}{s['gain']:.1f}",
        f"{s['regret']:.2f}",
        s["best"],
        f"{s['model']:.2f}",
        f"{s['dense_us']:.0f}",
        f"{row['floor_us']['bytes']:.0f}",
        f"{row['floor_us']['operations']:.0f}",
    ]
    return [cell.replace("nan", "") for cell in cells]


def main(
    device: Annotated[str, typer.Option(help="cpu or gpu")] = "cpu",
    rows: Annotated[str, typer.Option(help="values of M, by commas")] = "1,4,16,128",
    sizes: Annotated[
        str, typer.Option(help="NxK or EXPERTSxNxK by commas; 'all' for the target's list")
    ] = "all",
    odd: Annotated[
        bool, typer.Option(help="add experts and sizes that are awkward for MLX")
    ] = False,
    modes: Annotated[str, typer.Option(help="of " + ", ".join(MODES))] = COMMON,
    dtypes: str = "f32",
    repeats: int = 5,
    limit: Annotated[float, typer.Option(help="seconds one call may take")] = 1.0,
    table: Annotated[Path | None, typer.Option(help="add to this table of the package")] = None,
    only: Annotated[str, typer.Option(help="the kernels to measure, by commas")] = "",
    name: Annotated[str, typer.Option(help="of the file of results")] = "kernels",
) -> None:
    """Measure the kernels and what qgraph chooses among them."""
    target = as_target(device)
    chosen_sizes = SIZES.get(target.backend, SIZES["cuda"]) if sizes == "all" else sizes.split(",")
    grid = Grid(
        ROWS if rows == "all" else [int(m) for m in rows.split(",")],
        chosen_sizes + (ODD_SIZES + EXPERTS.get(target.backend, []) if odd else []),
        modes.split(","),
        dtypes.split(","),
    )
    wanted = frozenset(only.split(",")) - {""}
    columns = [[p for p in column if asked(p, wanted)] for column in grid.problems(target)]
    if not any(columns):
        raise typer.BadParameter(_nothing_to_measure(grid, target, wanted))
    rates = floors(target)
    found = []
    progress = Console(stderr=True, soft_wrap=True)
    for column in track(columns, "measuring", console=progress):
        bench = Bench(target, limit, repeats, rates, wanted)
        for problem in column:
            found.append(bench.row(problem))
            progress.print(f"{problem}: {found[-1]['us']}", highlight=False)
    machine = {**describe(target), "bandwidth": rates[0], "rate": rates[1]}
    if table is None:
        path = save(f"{name}_{target.backend}", {"machine": machine, "rows": found})
        show(found, Console(width=160))
    else:
        path = save_table(table, machine, found)
    print(f"written to {path}")


def save_table(path: Path, machine: dict[str, Any], found: list[dict[str, Any]]) -> Path:
    """Merge times into a shipped table, which keeps the shortest of each: others only add."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    keep = ("problem", *KEYS, "dtype")
    rows = {row["problem"]: row for row in old}
    for row in found:
        us = {**row["extrapolated_us"], **row["best_us"]}
        for kernel_name, before in rows.get(row["problem"], {"us": {}})["us"].items():
            us[kernel_name] = min(before, us.get(kernel_name, before))
        rows[row["problem"]] = {**{key: row[key] for key in keep}, "us": us}
    return save("", {"machine": machine, "rows": list(rows.values())}, path)


if __name__ == "__main__":
    typer.run(main)
