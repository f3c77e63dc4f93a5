"""Figures of the shipped tables of kernels: `python -m benchmarks.plot` writes docs/images.

Needs matplotlib: `pip install 'qgraph[bench]'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "qgraph"  # the same file for the same table

from matplotlib import pyplot as plt  # noqa: E402

from qgraph.kernels.cost import CostTable, shipped_tables  # noqa: E402

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SHOWN = {
    "cpu": ("f32", [(576, 576), (2048, 2048), (4096, 4096)]),
    "cuda": ("bf16", [(4096, 4096), (14336, 4096), (4096, 14336)]),
}
FAMILY = ("affine", 4)
GROUP = 64


def floors(n: int, k: int, m: int, machine: Any) -> tuple[float, float]:
    """Microseconds for the bytes of a packed weight, and for the operations."""
    packed = n * k * (0.5 + 8 / GROUP if machine["backend"] == "cpu" else 0.5 + 4 / GROUP)
    return 1e6 * packed / machine["bandwidth"], 1e6 * 2 * m * n * k / machine["rate"]


def draw(table: CostTable) -> Path:
    """One figure a table, one panel a size of weight."""
    backend = table.machine["backend"]
    dtype, sizes = SHOWN[backend]
    figure, axes = plt.subplots(1, len(sizes), figsize=(13, 4.2), sharey=True)
    colours: dict[str, str] = {}
    for axis, (n, k) in zip(axes, sizes, strict=True):
        kernels = sorted(name for name, kind in table.curves if kind == (*FAMILY, dtype, True))
        rows: set[int] = set()
        for name in kernels:
            times = times_of(table, name, dtype, n, k)
            if times:
                rows |= set(times)
                colour = colours.setdefault(name, f"C{len(colours)}")
                axis.plot(list(times), list(times.values()), "o-", ms=3, lw=1.2, color=colour,
                          label=name)  # fmt: skip
        some = sorted(rows)
        bounds = [floors(n, k, m, table.machine) for m in some]
        axis.plot(some, [b for b, _ in bounds], "k--", lw=0.8)
        axis.plot(some, [o for _, o in bounds], "k:", lw=0.8)
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
    path = IMAGES / f"kernels_{backend}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def times_of(table: CostTable, name: str, dtype: str, n: int, k: int) -> dict[int, float]:
    """Microseconds by rows that the table holds for one kernel and size."""
    start = f"{dtype}["
    middle = f"] x affine4[{n},{k}] g{GROUP}"
    found = {}
    for problem, us in table.exact.items():
        if problem.startswith(start) and middle in problem and name in us:
            found[int(problem[len(start) :].partition(",")[0])] = us[name]
    return dict(sorted(found.items()))


if __name__ == "__main__":
    for shipped in shipped_tables():
        print(f"written: {draw(shipped).relative_to(IMAGES.parents[1])}")
