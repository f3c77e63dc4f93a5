"""How long GPTQ takes for a layer of a Llama of 8B: `python -m benchmarks.gptq`.

Weights and inputs are random, inputs with columns that hang together; the shapes are those of the
model.  "scales" is the search of scales as well, and further visits of all groups; "the factor" is
that of the inverse Hessian, whose seconds are among those before it.  `--scale 0.125` makes all
sides so much shorter.  Errors are those of the products with inputs that were not fitted on, as a
share of plain rounding's.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer

from qgraph.fitting.numbers import on_grid
from qgraph.fitting.rounding.formats import Format, there
from qgraph.fitting.rounding.hessians import Curvature
from qgraph.fitting.rounding.rounded import nearest
from qgraph.fitting.statistics.moments import Moments

SHAPES = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
    "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
}  # fmt: skip
WAYS: dict[str, tuple[str, ...]] = {"gptq": ("gptq",), "gptq and scales": ("gptq", "scales")}


def main(
    scale: Annotated[float, typer.Option()] = 1.0,
    bits: Annotated[int, typer.Option()] = 4,
    rows: Annotated[int, typer.Option(help="of input")] = 8192,
    weights: Annotated[str, typer.Option()] = ",".join(SHAPES),
    ways: Annotated[str, typer.Option()] = ",".join(WAYS),
) -> None:
    total: dict[str, float] = dict.fromkeys(["hessians", *ways.split(",")], 0.0)
    hessians: dict[int, Any] = {}
    for name in weights.split(","):
        m, k = (round(side * scale) for side in SHAPES[name])
        start = time.perf_counter()
        if k not in hessians:
            hessians = {k: hessian(rows, k)}
        total["hessians"] += time.perf_counter() - start
        for way in ways.split(","):
            took, factor, share = timed(weight(m, k), hessians[k], bits, WAYS[way])
            total[way] += took
            print(
                f"{name:5} {m}x{k} {way:16} {took:7.2f} s, the factor {factor:5.2f}   "
                f"error {share:.3f} of plain",
                flush=True,
            )
    device = mx.device_info(mx.default_device()).get("device_name", mx.default_device())
    print(f"{device}: " + ", ".join(f"{way} {t:.1f} s" for way, t in total.items()))


def weight(rows: int, columns: int) -> Any:
    return np.random.default_rng(1).standard_normal((rows, columns), np.float32) / 64


def inputs(rows: int, columns: int, seed: int) -> Any:
    """Random rows whose columns hang together, in the same way for every seed."""
    mixing = np.random.default_rng(0).standard_normal((256, columns), np.float32) / 16
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((rows, 256), np.float32) @ mixing
    return mixed + random.standard_normal((rows, columns), np.float32) / 4


def hessian(rows: int, columns: int) -> Any:
    moments = Moments(columns, full=True)
    moments.add(inputs(rows, columns, 1))
    return moments.hessian()


def timed(w: Any, h: Any, bits: int, methods: tuple[str, ...]) -> tuple[float, float, float]:
    """Seconds of a weight, those of the factor among them, and the error of its products as a
    share of plain rounding's."""
    form = Format("affine", bits, 64)
    start = time.perf_counter()
    curvature = Curvature(h)
    _wait_for(curvature.factor)
    factor = time.perf_counter() - start
    rounded, _ = on_grid(there(w), curvature, form, mx.float16, methods)
    _wait_for(rounded.places, rounded.scales, rounded.biases)
    took = time.perf_counter() - start
    x, here = mx.array(inputs(512, w.shape[1], 2)), mx.array(w)
    near, plain = (
        mx.square((mx.array(each.values()) - here) @ x.T).sum()
        for each in (rounded, nearest(here, form, mx.float16))
    )
    return took, factor, float(near / plain)


def _wait_for(*arrays: Any) -> None:
    mx.eval([array for array in arrays if isinstance(array, mx.array)])


if __name__ == "__main__":
    typer.run(main)
