"""Sums over the ranks of a mesh within regions: two processes, on two GPUs or on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from qgraph.target import as_target
from tests.support.ports import free_ports, hosts

GPU = mx.Device(mx.gpu, 0)
pytestmark = pytest.mark.skipif(
    not mx.is_available(GPU) or "sm_9" not in as_target(GPU).arch, reason="needs a Hopper GPU"
)
ROOT = Path(__file__).parents[2]
PATIENCE = 120


@pytest.mark.parametrize("backend", ["ring", "nccl"])
def test_tokens(backend: str, tmp_path: Path) -> None:
    """Each rank finds the same tokens, twice, and its logits are those of one device."""
    count = mx.device_count(mx.gpu)
    if backend == "nccl" and count < 2:
        pytest.skip("needs two GPUs")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if backend == "nccl":
        env |= {
            "MLX_WORLD_SIZE": "2",
            "NCCL_HOST_IP": "127.0.0.1",
            "NCCL_PORT": str(*free_ports(1)),
        }
    else:
        env["MLX_HOSTFILE"] = str(hosts(2, tmp_path))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.peer_rank", backend],
            env={**env, "MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank % count)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [p.communicate(timeout=PATIENCE) for p in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, texts, strict=True):
        assert process.returncode == 0, errors
    lines = {line for out, _ in texts for line in out.splitlines() if line.startswith("tokens")}
    assert len(lines) == 1
