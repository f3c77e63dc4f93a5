"""A call of a compiled program over a bare `mx.compile` call of the same function.

    python -m benchmarks.overhead

Measured at 1, 10 and 300 captured weights, small ones, so that the call is what takes time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

import qgraph as qg
from benchmarks.measure import interleaved


def main() -> None:
    table = Table(title="microseconds a call, without evaluating", title_justify="left")
    for heading in ("weights", "mx.compile", "qgraph", "difference", "ratio"):
        table.add_column(heading, justify="right")
    worst = 0.0
    for count in (1, 10, 300):
        weights = [mx.ones((8, 8)) * i for i in range(count)]
        mx.eval(weights)

        def chain(x: Any, weights: list[mx.array] = weights) -> Any:
            for w in weights:
                x = x + w
            return x

        x = mx.ones((8, 8))
        bare: Callable[[mx.array], mx.array] = mx.compile(chain)
        program = qg.compile(chain, x)
        mx.eval(bare(x), program(x))
        results = interleaved(
            {"bare": lambda f=bare, x=x: f(x), "ours": lambda f=program, x=x: f(x)},
            repeats=41, inner=200 if count < 100 else 20,
        )  # fmt: skip
        bare_us, ours_us = (1e6 * results[name].median for name in ("bare", "ours"))
        worst = max(worst, ours_us - bare_us)
        table.add_row(
            str(count),
            f"{bare_us:.2f}",
            f"{ours_us:.2f}",
            f"{ours_us - bare_us:+.2f}",
            f"{ours_us / bare_us:.2f}",
        )
    Console(width=100).print(table)
    print(f"largest difference: {worst:.2f} us (at most 10)")


if __name__ == "__main__":
    main()
