"""What a machine is and the two rates that bound every product on it."""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.target import Target
from qgraph.timing import interleaved

RESULTS = Path(__file__).parent / "results"


@contextmanager
def on_cpu() -> Iterator[None]:
    """The CPU as MLX's default device."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


def describe(target: Target) -> dict[str, Any]:
    """Kind of machine, versions and date; no names of hosts."""
    return {
        "backend": target.backend,
        "arch": target.arch,
        "device": mx.device_info(target.device).get("device_name", ""),
        "cores": target.cores,
        "mlx": version("mlx"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def floors(target: Target) -> tuple[float, float]:
    """Bytes a second of a large copy (read plus written) and dense operations a second.

    On CPUs float32 through NumPy on all cores; on GPUs bfloat16 through MLX.
    """
    rates = _cpu_floors(target.cores) if target.is_cpu else _gpu_floors()
    time.sleep(0.1)  # BLAS's threads spin for a while after a call and would disturb what follows
    return rates


def _cpu_floors(cores: int) -> tuple[float, float]:
    size = 16 << 20
    source = np.ones(cores * size, np.float32)
    copy = np.empty_like(source)
    shares = [slice(i * size, (i + 1) * size) for i in range(cores)]
    a = np.random.default_rng(0).random((2048, 2048), np.float32)
    with ThreadPoolExecutor(cores) as pool:
        timings = interleaved(
            {
                "copy": lambda: list(pool.map(lambda s: np.copyto(copy[s], source[s]), shares)),
                "matmul": lambda: a @ a,
            },
            repeats=7,
        )
    seconds = {name: timing.best for name, timing in timings.items()}
    return 2 * source.nbytes / seconds["copy"], 2 * 2048**3 / seconds["matmul"]


def _gpu_floors() -> tuple[float, float]:
    source = mx.random.normal((1 << 29,))
    a = mx.random.normal((8192, 8192)).astype(mx.bfloat16)
    mx.eval(source, a)
    timings = interleaved(
        {"copy": lambda: mx.eval(source + 1.0), "matmul": lambda: mx.eval(a @ a)}, repeats=7
    )
    seconds = {name: timing.best for name, timing in timings.items()}
    return 2 * source.nbytes / seconds["copy"], 2 * 8192**3 / seconds["matmul"]


def save(name: str, data: dict[str, Any], path: Path | None = None) -> Path:
    """Write results as JSON, by default to `benchmarks/results/NAME.json`."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(row) for row in data["rows"])
    rest = {key: value for key, value in data.items() if key != "rows"}
    head = json.dumps(rest, indent=1)[:-2]
    path.write_text(f'{head},\n "rows": [\n{rows}\n]\n}}\n')
    return path
