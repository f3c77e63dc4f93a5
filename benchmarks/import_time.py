"""Import and optimize every model of mlx-lm that imports, and one of 10,000 primitives.

    python -m benchmarks.import_time [model ...]

Nodes are those of the graph as imported, and once its norms, rotations and attentions are raised.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

import qgraph as qg
from qgraph.errors import UnsupportedError
from tests import zoo

LONG = {"num_hidden_layers": 120}
PRIMITIVES = 10_000


def measure(model: Any, ids: mx.array) -> tuple[float, float, int, int]:
    """Seconds of import and of optimizing, and nodes before and after raising."""
    start = time.perf_counter()
    graph = qg.from_mlx(model, ids)
    imported = time.perf_counter()
    plan = qg.optimize(graph, target="cpu")
    done = time.perf_counter()
    (raised,) = [s.after for s in plan.steps if s.name == "raise-attention"]
    return imported - start, done - imported, graph.count(), raised.count()


def long_llama() -> Any:
    from mlx_lm.models import llama

    settings = {"model_type": "llama", **zoo.COMMON, **LONG, "layer_types": None}
    model = llama.Model(llama.ModelArgs.from_dict(settings))
    mx.eval(model.parameters())
    return model


def main(names: list[str]) -> None:
    table = Table(title="seconds, and nodes", title_justify="left")
    for heading in ("model", "import", "optimize", "nodes", "raised"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = {}
    for name in names or zoo.architectures():
        try:
            rows[name] = measure(zoo.build(name), zoo.inputs(name)[0])
        except UnsupportedError as error:
            print(f"left out: {error.what}")
    model = long_llama()
    # The shortest of three: what others do on the machine only adds to a time.
    long = min((measure(model, zoo.IDS) for _ in range(3)), key=lambda row: row[0] + row[1])
    rows["llama of 120 layers"] = long
    for name, (imported, optimized, nodes, raised) in rows.items():
        table.add_row(name, f"{imported:.3f}", f"{optimized:.3f}", f"{nodes:,}", f"{raised:,}")
    Console(width=100).print(table)
    models = {name: row for name, row in rows.items() if row is not long}
    both = {name: row[0] + row[1] for name, row in models.items()}
    if both:
        worst = max(both, key=both.__getitem__)
        nodes, raised = (sum(row[i] for row in models.values()) for i in (2, 3))
        print(f"{len(both)} models: median {statistics.median(both.values()):.2f} s, "
              f"worst {both[worst]:.2f} s ({worst})")  # fmt: skip
        print(f"nodes: {nodes:,} as imported, {raised:,} raised")
    if long[2] < PRIMITIVES:
        print(f"the long model has only {long[2]:,} primitives")
    print(f"{long[2]:,} primitives: {long[0] + long[1]:.2f} s (under 5)")


if __name__ == "__main__":
    main(sys.argv[1:])
