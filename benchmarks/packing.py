"""Peak memory while 40 float32 weights of 16 MiB are packed to 4 bits.

    python -m benchmarks.packing

The weights are read lazily from a safetensors file, so one at a time is ever in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

import qgraph as qg

COUNT, SIZE = 40, 2048
MIB = 2**20


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        mx.save_safetensors(
            str(path),
            {f"w{i}": mx.random.normal((SIZE, SIZE), key=mx.random.key(i)) for i in range(COUNT)},
        )
        mx.clear_cache()
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        program = build(path)
        peak = mx.get_peak_memory() - start
    packed, weight = program.weight_bytes, SIZE * SIZE * 4
    print(f"packed weights:                {packed / MIB:8.1f} MiB")
    print(f"two float weights:             {2 * weight / MIB:8.1f} MiB")
    print(f"their sum, the bound:          {(packed + 2 * weight) / MIB:8.1f} MiB")
    print(f"peak while packing:            {peak / MIB:8.1f} MiB")
    print(f"all float weights, to compare: {COUNT * weight / MIB:8.1f} MiB")
    print(f"peak / bound: {peak / (packed + 2 * weight):.3f} (under 1)")


def build(path: Path) -> qg.Program:
    loaded: Any = mx.load(str(path))

    def fn(x: Any) -> Any:
        for name in loaded:
            x = qg.quantized_matmul(x, loaded[name])
        return x

    graph = qg.trace(fn, qg.spec((1, SIZE)))
    loaded.clear()  # the graph alone holds the weights now, and lets each go as it is packed
    return qg.compile(graph, release=True)


if __name__ == "__main__":
    main()
