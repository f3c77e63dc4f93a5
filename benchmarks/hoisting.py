"""A loop that quantizes its weight at every turn: MLX as written, tuned by hand, and qgraph.

    python -m benchmarks.hoisting

64 steps of `tanh(quantized_matmul(h, w))`, w float 2048 by 2048, 4 bits, groups of 64.
"""

from __future__ import annotations

import mlx.core as mx

import qgraph as qg
from benchmarks.measure import interleaved, paired_ratio, print_table

STEPS, SIZE = 64, 2048


def main() -> None:
    w = mx.random.normal((SIZE, SIZE), key=mx.random.key(0)) * SIZE**-0.5
    x = mx.random.normal((1, SIZE), key=mx.random.key(1))
    packed = mx.quantize(w)
    mx.eval(w, x, packed)

    def as_written(h: mx.array) -> mx.array:
        for _ in range(STEPS):
            h = mx.tanh(mx.quantized_matmul(h, *mx.quantize(w)))
        return h

    @mx.compile
    def by_hand(h: mx.array) -> mx.array:
        for _ in range(STEPS):
            h = mx.tanh(mx.quantized_matmul(h, *packed))
        return h

    def in_qgraph(x: qg.Tensor) -> qg.Tensor:
        return qg.fori_loop(0, STEPS, lambda i, h: qg.tanh(qg.quantized_matmul(h, w)), x)

    program = qg.compile(in_qgraph, qg.spec((1, SIZE)))
    difference = mx.abs(program(x) - by_hand(x)).max().item()
    results = interleaved(
        {
            "MLX as written": lambda: mx.eval(as_written(x)),
            "MLX tuned by hand": lambda: mx.eval(by_hand(x)),
            "qgraph": lambda: mx.eval(program(x)),
        },
        repeats=21,
    )
    print_table("64 steps of tanh(quantized_matmul(h, w)), w 2048x2048 float32", results)
    for other, bound in (("MLX tuned by hand", 1.05), ("MLX as written", 0.2)):
        ratio = paired_ratio(results["qgraph"], results[other])
        print(f"qgraph / {other}: {ratio:.3f} (at most {bound})")
    print(f"largest difference from tuned by hand: {difference:g}")


if __name__ == "__main__":
    main()
