"""Import and optimize every architecture of mlx-lm that a tiny configuration builds.

    python -m benchmarks.import_time

For each the shortest of three runs: seconds of `qg.from_mlx` and of `qg.optimize`, and nodes as
imported, after the passes that raise expanded ops, and at the end.  Then the same for a llama of
more and more layers, up to some 10,000 primitives of MLX.
"""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

import qgraph as qg
from qgraph.importer.capture import capture
from qgraph.tree import flatten
from tests.support import zoo

LAYERS = (1, 10, 30, 82)
REPEATS = 3


@dataclass(frozen=True)
class Row:
    """What one model takes: seconds, and nodes without constants."""

    name: str
    import_seconds: float
    optimize_seconds: float
    imported: int
    raised: int
    final: int

    @property
    def seconds(self) -> float:
        return self.import_seconds + self.optimize_seconds


def measure(name: str, model: Any, ids: mx.array) -> Row:
    """The shortest of some runs; others on the machine only make them longer."""
    rows = []
    for _ in range(REPEATS):
        gc.collect()
        start = time.perf_counter()
        graph = qg.from_mlx(model, ids)
        middle = time.perf_counter()
        plan = qg.optimize(graph, target="cpu")
        end = time.perf_counter()
        raising = [step for step in plan.steps if step.name.startswith("raise-")]
        raised = (raising[-1].after if raising else graph).count()
        rows.append(Row(name, middle - start, end - middle, graph.count(), raised,
                        plan.graph.count()))  # fmt: skip
    return min(rows, key=lambda row: row.seconds)


def llama(layers: int) -> Any:
    """A llama of this many layers, 64 wide."""
    module = importlib.import_module("mlx_lm.models.llama")
    own = {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    config = {"model_type": "llama", **zoo.COMMON, **own}
    model = module.Model(module.ModelArgs.from_dict(config))
    model.eval()
    mx.eval(model.parameters())
    return model


def primitives(model: Any) -> int:
    """How many MLX hands over."""
    arrays, tree = flatten(((zoo.IDS,), {}), static=True)
    return len(capture(model, arrays, tree).primitives)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for heading in ("import ms", "optimize ms", "nodes", "raised", "at the end"):
        table.add_column(heading, justify="right")
    return table


def _add(table: Table, row: Row, name: str = "") -> None:
    table.add_row(
        name or row.name,
        f"{row.import_seconds * 1e3:.0f}",
        f"{row.optimize_seconds * 1e3:.0f}",
        *(f"{count:.0f}" for count in (row.imported, row.raised, row.final)),
    )


def main() -> None:
    console = Console()
    rows, refused = [], []
    for name in zoo.architectures():
        try:
            rows.append(measure(name, zoo.build(name), zoo.inputs(name)[0]))
        except qg.errors.UnsupportedError:
            refused.append(name)
    rows.sort(key=lambda row: row.seconds)
    table = _table(f"{len(rows)} architectures of mlx-lm; refused: {', '.join(refused)}")
    for row in rows[-5:]:
        _add(table, row)
    middle = Row("", *(statistics.median(getattr(row, field) for row in rows) for field in (
        "import_seconds", "optimize_seconds", "imported", "raised", "final")))  # fmt: skip
    _add(table, middle, "median")
    console.print(table)

    table = _table("llama, by how many primitives MLX hands over")
    for layers in LAYERS:
        model = llama(layers)
        row = measure("", model, zoo.IDS)
        count = primitives(model)
        _add(table, row, f"{count:,} primitives")
    console.print(table)
    print(f"{count:,} primitives: {row.seconds:.2f} s (10,000 under 5)")


if __name__ == "__main__":
    main()
