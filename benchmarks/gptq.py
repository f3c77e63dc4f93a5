"""How long GPTQ takes for a layer of a Llama of 8B: `python -m benchmarks.gptq`.

Weights and inputs are random, inputs with columns that hang together; the shapes are those of the
model.  "scales" is the search of scales and the second visit of all codes as well.  `--scale 0.125`
makes all sides so much shorter.  Errors are those of the products, as a share of plain rounding's.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer

from qgraph.fitting.formats import Format
from qgraph.fitting.gptq import error, nearest
from qgraph.fitting.moments import Moments
from qgraph.fitting.rounded import on_grid

SHAPES = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
    "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
}  # fmt: skip
WAYS: dict[str, tuple[str, ...]] = {"gptq": ("gptq",), "gptq and scales": ("gptq", "scales")}


def inputs(rows: int, columns: int) -> Any:
    random = np.random.default_rng(0)
    few = random.standard_normal((rows, 256), np.float32)
    mixed = few @ random.standard_normal((256, columns), np.float32) / 16
    return mixed + random.standard_normal((rows, columns), np.float32) / 4


def main(
    scale: Annotated[float, typer.Option()] = 1.0,
    bits: Annotated[int, typer.Option()] = 4,
    rows: Annotated[int, typer.Option(help="of input")] = 2048,
    ways: Annotated[str, typer.Option()] = ",".join(WAYS),
) -> None:
    form = Format("affine", bits, 64)
    random = np.random.default_rng(1)
    total: dict[str, float] = dict.fromkeys(["hessians", *ways.split(",")], 0.0)
    for name, shape in SHAPES.items():
        m, k = (round(side * scale) for side in shape)
        w = random.standard_normal((m, k), np.float32) / 64
        x = inputs(rows, k)
        start = time.perf_counter()
        moments = Moments(k, full=True)
        moments.add(x)
        h = moments.mean()
        total["hessians"] += time.perf_counter() - start
        near = h.astype(np.float32)
        plain = float(error(w, near, nearest(w, form, mx.float16)).sum())
        for way in ways.split(","):
            start = time.perf_counter()
            rounded, _ = on_grid(w, h, form, mx.float16, WAYS[way])
            took = time.perf_counter() - start
            total[way] += took
            share = float(error(w, near, rounded).sum()) / plain
            print(
                f"{name:5} {m}x{k} {way:16} {took:7.2f} s   error {share:.3f} of plain", flush=True
            )
    device = mx.device_info(mx.default_device()).get("device_name", mx.default_device())
    print(f"{device}: " + ", ".join(f"{way} {t:.1f} s" for way, t in total.items()))


if __name__ == "__main__":
    typer.run(main)
