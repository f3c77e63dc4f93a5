"""Figures of the shipped tables of kernels: `python -m benchmarks.plot` writes docs/images.

Needs matplotlib: `pip install 'qgraph[bench]'`.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "qgraph"  # the same file for the same table

from matplotlib import pyplot as plt  # noqa: E402

from qgraph.kernels import Problem  # noqa: E402
from qgraph.kernels.choice.cost import CostTable, problem_key, shipped_tables  # noqa: E402
from qgraph.types import DTYPES  # noqa: E402

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SHOWN = {
    "cpu": ("f32", [(576, 576), (2048, 2048), (4096, 4096)]),
    "cuda": ("bf16", [(4096, 4096), (14336, 4096), (4096, 14336)]),
}
FAMILY = ("affine", 4)
GROUP = 64


def problems(table: CostTable, n: int, k: int, dtype: str) -> list[Problem]:
    """Those of one weight that the table holds, by growing rows."""
    where = {key: table.machine[key] for key in ("backend", "arch", "cores")}
    rows = {
        round(math.exp(log_rows))
        for (_, kind), sizes in table.curves.items()
        if kind == (*FAMILY, dtype, True)
        for log_rows, _ in itertools.chain(*sizes.values())
    }
    found = [Problem(m, n, k, DTYPES[dtype], *FAMILY, GROUP, **where) for m in sorted(rows)]
    return [problem for problem in found if problem_key(problem) in table.exact]


def draw(name: str, table: CostTable) -> Path:
    """One figure a table, one panel a size of weight."""
    backend = table.machine["backend"]
    dtype, sizes = SHOWN[backend]
    figure, axes = plt.subplots(1, len(sizes), figsize=(13, 4.2), sharey=True)
    colours: dict[str, str] = {}
    for axis, (n, k) in zip(axes, sizes, strict=True):
        kernels = sorted(k for k, kind in table.curves if kind == (*FAMILY, dtype, True))
        shown = problems(table, n, k, dtype)
        for kernel in kernels:
            times = {p.m: us for p in shown if (us := table.measured(kernel, p)) is not None}
            if times:
                colour = colours.setdefault(kernel, f"C{len(colours)}")
                axis.plot(list(times), list(times.values()), "o-", ms=3, lw=1.2, color=colour,
                          label=kernel)  # fmt: skip
        some = [p.m for p in shown]
        bandwidth, rate = table.machine["bandwidth"], table.machine["rate"]
        axis.plot(some, [1e6 * p.packed_bytes / bandwidth for p in shown], "k--", lw=0.8)
        axis.plot(some, [1e6 * p.flops / rate for p in shown], "k:", lw=0.8)
        axis.set(xscale="log", yscale="log", title=f"{n} × {k}", xlabel="rows of x")
        axis.set_xticks(some, [str(m) for m in some], fontsize=7, minor=False, rotation=60)
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("microseconds")
    handles = {line.get_label(): line for axis in axes for line in axis.get_lines()
               if not line.get_label().startswith("_")}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="center right", fontsize=8, frameon=False)
    device, cores = table.machine["device"], table.machine["cores"]
    where = f"{cores} cores of an {device}" if backend == "cpu" else f"one {device}"
    figure.suptitle(f"{dtype} by 4 bits in groups of {GROUP}, {where}, mlx {table.machine['mlx']}")
    figure.tight_layout(rect=(0, 0, 0.86, 1))
    path = IMAGES / f"kernels_{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    for name, shipped in shipped_tables().items():
        print(f"written: {draw(name, shipped).relative_to(IMAGES.parents[1])}")
