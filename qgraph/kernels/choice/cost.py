"""What a kernel takes on a target, without running it: a shipped table, interpolated.

Times grow with rows and with the size of the weight about as powers do, so both are interpolated
in log space.  Beyond the table time grows with the work; below its smallest weight, it stays.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ...types import SHORT_NAMES
from ..base import Problem

Family = tuple[str, int, str, bool]
"""Mode, bits, dtype of x and transpose: what times are not interpolated over."""

Curve = list[tuple[float, float]]


def family(problem: Problem) -> Family:
    return problem.mode, problem.bits, SHORT_NAMES[problem.dtype], problem.transpose


def problem_key(problem: Problem) -> str:
    """What identifies a problem on one machine, as text.

    >>> import mlx.core as mx
    >>> problem_key(Problem(1, 64, 128, mx.float32, "affine", 4, 64))
    'f32[1,128] x affine4[64,128] g64 s:f32'
    """
    return str(problem)


@dataclass(frozen=True)
class CostTable:
    """Measured microseconds by problem and kernel, of one machine.

    Attributes:
        machine: what it was measured on: backend, arch, cores, mlx, date.
        exact: by the problem's text.
        curves: by kernel and family, for each weight size points (log rows, log microseconds).
    """

    machine: Mapping[str, Any]
    exact: Mapping[str, Mapping[str, float]]
    curves: Mapping[tuple[str, Family], Mapping[int, Curve]]

    @staticmethod
    def of(data: Mapping[str, Any]) -> CostTable:
        """From the form in the JSON file: "machine" and "rows"."""
        curves: dict[tuple[str, Family], dict[int, Curve]] = {}
        exact = {}
        on_cuda = data["machine"]["backend"] == "cuda"
        for row in data["rows"]:
            exact[row["problem"]] = row["us"]
            if row.get("experts") or (on_cuda and not _whole_tiles(row["n"], row["k"])):
                continue  # others are not estimated from these
            kind = (row["mode"], row["bits"], row["dtype"], row["transpose"])
            for name, us in row["us"].items():
                sizes = curves.setdefault((name, kind), {})
                point = (math.log(row["m"]), math.log(us))
                sizes.setdefault(row["n"] * row["k"], []).append(point)
        for sizes in curves.values():
            for curve in sizes.values():
                curve.sort()
        return CostTable(data["machine"], exact, curves)

    def measured(self, name: str, problem: Problem) -> float | None:
        """Microseconds of exactly this problem, on as many cores."""
        if problem.backend == "cpu" and problem.cores != self.machine["cores"]:
            return None
        return self.exact.get(problem_key(problem), {}).get(name)

    def interpolated(self, name: str, problem: Problem) -> float | None:
        """Microseconds, interpolated; None if the table holds nothing like it.

        None too for CUDA sizes that MLX gives to other kernels than those of the table's curves.
        """
        if problem.backend == "cuda" and not _whole_tiles(problem.n, problem.k, problem.group_size):
            return None
        sizes = self.curves.get((name, family(problem)))
        if not sizes:
            return None
        return math.exp(_between(sizes, math.log(problem.m), problem.n * problem.k))


def _along(curve: Curve, x: float) -> float:
    """Log time at log rows x: linear between points, flat before, growing with x after."""
    if x <= curve[0][0]:
        return curve[0][1]
    if x >= curve[-1][0]:
        return curve[-1][1] + x - curve[-1][0]
    i = bisect.bisect_right(curve, (x, -math.inf))
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _between(sizes: Mapping[int, Curve], x: float, size: int) -> float:
    known = sorted(sizes)
    if size >= known[-1]:
        return _along(sizes[known[-1]], x) + math.log(size / known[-1])
    if size <= known[0]:
        return _along(sizes[known[0]], x)  # what is left there is overhead
    i = bisect.bisect_right(known, size)
    low, high = known[i - 1], known[i]
    share = math.log(size / low) / math.log(high / low)
    return (1 - share) * _along(sizes[low], x) + share * _along(sizes[high], x)


@cache
def shipped_tables() -> Mapping[str, CostTable]:
    """The tables that the package brings, by name, in its order."""
    folder = resources.files("qgraph.kernels.choice") / "tables"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return {f.name[:-5]: CostTable.of(json.loads(f.read_text())) for f in files}


def table_for(problem: Problem) -> CostTable:
    """The shipped table of the problem's machine; an empty one if none is.

    Of a GPU that none was measured on it is the first of its architecture: an H100's for an H20.
    """
    shipped = shipped_tables().values()
    near = [table for table in shipped if _of_one_architecture(table.machine, problem)]
    machine = {key: getattr(problem, key) for key in ("backend", "arch", "cores")}
    nothing = CostTable(machine, {}, {})
    return min(near, key=lambda table: table.machine["arch"] != problem.arch, default=nothing)


def _of_one_architecture(machine: Mapping[str, Any], problem: Problem) -> bool:
    """Do a table's machine and a problem's differ in their GPU's name at most?"""
    theirs = machine["backend"], machine["arch"].partition(" ")[0]
    return theirs == (problem.backend, problem.arch.partition(" ")[0])


def _whole_tiles(n: int, k: int, group_size: int = 0) -> bool:
    """Does MLX on CUDA take its kernel for whole tiles, from 8 rows on?"""
    return n % 128 == 0 and k % max(64, group_size) == 0
