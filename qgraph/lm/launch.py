"""mlx-lm's `generate` on several ranks: launching them, and what each does differently."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..mesh import Mesh, launched_backend

_LAUNCHER = "from mlx._distributed_utils.launch import main; main()"  # what `mlx.launch` runs


def launch(ranks: int, command: Sequence[str]) -> int:
    """Run a qgraph command in so many processes of this machine; the exit status.

    GPUs talk over `nccl`, processors over `ring`.  All of NCCL's calls are on one stream, so it
    need not order those that CUDA graphs hold among others: a tenth of a token's time.
    """
    on_gpu = mx.default_device() != mx.Device(mx.cpu, 0) and mx.distributed.is_available("nccl")
    backend = "nccl" if on_gpu else "ring"
    launcher = [sys.executable, "-c", _LAUNCHER, "-n", str(ranks), "--backend", backend, "--"]
    env = {"NCCL_GRAPH_MIXING_SUPPORT": "0", **os.environ}
    command = [*launcher, sys.executable, "-m", "qgraph.cli", *command]
    ran = subprocess.run(command, env=env, check=False)
    return ran.returncode


def launched() -> Mesh | None:
    """The mesh that this process was launched for, or None if it is alone."""
    if not {"MLX_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
        return None
    group = mx.distributed.init(strict=True, backend=launched_backend())
    return Mesh.of(group) if group.size() > 1 else None


@contextlib.contextmanager
def as_one(mesh: Mesh) -> Iterator[None]:
    """Ranks draw the same random numbers, and the first one alone prints."""
    seed = mx.array(time.time_ns() % 2**31 if mesh.rank == 0 else 0, mx.int32)
    mx.random.seed(int(mx.distributed.all_sum(seed, group=mesh.group).item()))  # type: ignore[arg-type]
    if mesh.rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
