"""How long it takes to print, fold and search a graph of 10,000 nodes: `python -m benchmarks.text`.

The figure to hold is 2 s for each.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.timing import interleaved

WAYS: dict[str, dict[str, Any]] = {
    "print": {},
    "folded": {"fold": True},
    "with costs": {"costs": True},
    "what feeds a value": {"feeds": "%9000"},
    "one op": {"op": "tanh"},
    "in colour": {"colour": True},
}


def main(layers: int = 3334) -> None:
    w = mx.ones((64, 64))

    def model(x: Any) -> Any:
        for _ in range(layers):
            x = qg.tanh(x @ w) + x
        return x

    graph = qg.trace(model, qg.spec((1, 64)))
    ways = {name: (lambda o=o: graph.format(**o)) for name, o in WAYS.items()}
    print(f"{graph.count()} nodes")
    for name, timing in interleaved(ways, repeats=5, warmup=1).items():
        print(f"{name:20} {timing.median:.2f} s")


if __name__ == "__main__":
    main()
