"""Meshes: the ranks that one graph is spread over, and what it costs them to talk."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import InputError


@dataclass(frozen=True, slots=True)
class Link:
    """How ranks reach each other.

    Attributes:
        latency: seconds that a collective of a few bytes takes.
        bandwidth: bytes a second from one rank to its neighbour.
        within: seconds that a sum of a few rows takes inside a kernel, where ranks share memory.
        pushed: how two ranks reach each other that push sums, where they share memory.
    """

    latency: float
    bandwidth: float
    within: float | None = None
    pushed: Link | None = None


LINKS = {
    # all_sum of some KB between two processes of one machine, and between two H100s: of 8 KB 38 µs
    # as a launch of NCCL, 23 of our own, at most 16 in a region, and of 33.6 MB 162 and 154
    # (decisions 0029, 0031); pushed, with what follows, 53 µs of 16.8 MB (0040).
    "ring": Link(220e-6, 1e9),
    "nccl": Link(38e-6, 270e9, within=16e-6, pushed=Link(10e-6, 390e9)),
    # Never measured: Thunderbolt 5 by its data sheet; MPI as TCP.
    "jaccl": Link(30e-6, 8e9),
    "mpi": Link(220e-6, 1e9),
}
"""By back end of `mx.distributed`."""

Goal = Literal["memory", "time"]

FEW_ROWS = 8
"""Up to which a product and what follows it are one kernel on GPUs."""

INBOX = 32 << 20
"""Bytes of a sum that a GPU may push to another."""


@dataclass(frozen=True)
class Mesh:
    """The ranks of a graph: `Mesh(4)` in one process, `Mesh.of(group)` in as many as launched.

    In one process every rank is run in turn and collectives are computed, for exact tests and for
    looking at plans.

    Attributes:
        size: how many ranks.
        rank: which one this process is; None where one process runs all.
        backend: of `mx.distributed`, for the cost of collectives.
        group: what MLX's collectives are given.
        goal: "memory": no rank holds a weight of which it can hold a part; "time": a weight is
            split only where that should be faster.
        overlap: rows of a prompt go in halves on GPUs, one summed over the ranks while the other is
            computed, where that should be faster.  Between two H100s it was slower.

    Raises:
        InputError: a size below 1, an unknown back end, or another goal.

    >>> import mlx.core as mx
    >>> Mesh(4)
    Mesh(4 ranks in one process)
    >>> Mesh.of(mx.distributed.init()).size
    1
    """

    size: int
    rank: int | None = None
    backend: str = "ring"
    group: Any = field(default=None, compare=False)
    goal: Goal = "memory"
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"a mesh of {self.size}", hint="give the number of ranks, 1 or more")
        if self.backend not in LINKS:
            known = ", ".join(LINKS)
            raise InputError(f"no back end {self.backend!r} for a mesh", hint=f"one of {known}")
        if self.goal not in get_args(Goal):
            raise InputError(f"a mesh for {self.goal!r}", hint="its goal is 'memory' or 'time'")

    @staticmethod
    def of(group: Any, backend: str = "", goal: Goal = "memory", *, overlap: bool = False) -> Mesh:
        """The mesh of an MLX group, of which this process is one rank.

        Args:
            group: what `mx.distributed.init()` gave.
            backend: of that group; by default the one whose variables the launcher has set.
            goal, overlap: as the mesh's.
        """
        name = backend or launched_backend()
        return Mesh(group.size(), group.rank(), name, group, goal, overlap)

    @property
    def in_one_process(self) -> bool:
        return self.rank is None

    def seconds(self, op: str, nbytes: float, rows: int | None = None) -> float:
        """What a collective should take.

        Args:
            op: "all_sum", "all_max", "all_gather" or "sum_scatter".
            nbytes: of the whole value; of all parts, for the last two.
            rows: of the value, where it is known: sums of up to 8 may be taken within a kernel.

        >>> 1e6 * Mesh(2).seconds("all_sum", 1000)
        221.0
        >>> round(1e6 * Mesh(2, backend="nccl").seconds("all_sum", 16 << 20))  # pushed
        53
        """
        if self.size == 1:
            return 0.0
        link = LINKS[self.backend]
        turns = 2 if op in ("all_sum", "all_max", "all_min") else 1
        moved = turns * nbytes * (self.size - 1) / self.size
        few = op == "all_sum" and rows is not None and rows <= FEW_ROWS
        if op == "all_sum" and self.size == 2 and nbytes <= INBOX and not few:
            link = link.pushed or link
        latency = link.within if few and link.within is not None else link.latency
        return latency + moved / link.bandwidth

    def __repr__(self) -> str:
        if self.rank is None:
            return f"Mesh({self.size} ranks in one process)"
        return f"Mesh(rank {self.rank} of {self.size}, {self.backend})"


def launched_backend() -> str:
    """The back end that this process was launched for, by its environment, as MLX reads it."""
    if "MLX_HOSTFILE" in os.environ:
        return "ring"
    if "NCCL_PORT" in os.environ or "NCCL_HOST_IP" in os.environ:
        return "nccl"
    if any(name.startswith("MLX_JACCL") or name.startswith("MLX_IBV") for name in os.environ):
        return "jaccl"
    return "mpi" if any(name.startswith("OMPI_") for name in os.environ) else "ring"
