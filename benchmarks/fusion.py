"""Each case of fusion as written and optimized: milliseconds and peak bytes in one run.

    python -m benchmarks.fusion

Both run compiled; "as written" is the traced graph without passes.  2048 by 2048 affine 4 bits,
groups of 64, float32, one row, unless the case says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

import qgraph as qg
from benchmarks.measure import interleaved, milliseconds, paired_ratio

SIZE = 2048
KEY = mx.random.key(0)
W = mx.random.normal((SIZE, SIZE), key=KEY) * SIZE**-0.5
Q = mx.quantize(W)
HALF = mx.quantize(W.astype(mx.bfloat16))
EXPERTS = mx.quantize(mx.random.normal((4, SIZE // 2, SIZE), key=KEY) * SIZE**-0.5)
IDS = mx.array([1, 3], mx.uint32)


def dense(parts: Any = Q) -> Any:
    return qg.dequantize(*parts)


SMALL = mx.random.normal((512, 512), key=KEY) * 512**-0.5
STACK = mx.broadcast_to(SMALL, (8, 512, 512)) + 0.0


def outside(x: Any) -> Any:
    w = dense().T
    return qg.fori_loop(0, 8, lambda i, h: qg.tanh(h @ w), x)


X1, X16 = (mx.random.normal((rows, SIZE), key=KEY) for rows in (1, 16))
CASES: dict[str, tuple[Callable[[Any], Any], mx.array]] = {
    "1 x @ dequantize(q).T": (lambda x: x @ dense().T, X1),
    "1 x @ dequantize(q)": (lambda x: x @ dense(), X1),
    "1 the same, 16 rows": (lambda x: x @ dense().T, X16),
    "2 bfloat16": (lambda x: x @ dense(HALF).T, X1.astype(mx.bfloat16)),
    "2 scales of bfloat16, x of float32": (lambda x: x @ dense(HALF).astype(mx.float32).T, X1),
    "3 addmm": (lambda x: qg.addmm(x, x, dense().T), X1),
    "3 einsum": (lambda x: qg.einsum("mk,nk->mn", x, dense()), X1),
    "3 einsum, heads as an axis": (
        lambda x: qg.einsum("mk,hdk->mhd", x, dense().reshape(32, 64, SIZE)), X1,
    ),
    "3 a weight times a number": (lambda x: x @ (dense() * 0.5).T, X1),
    "4 dequantize(q) @ x": (lambda x: dense() @ x, X1.T),
    "5 gather_mm of experts": (
        lambda x: qg.gather_mm(x, dense(EXPERTS).swapaxes(1, 2), None, IDS),
        mx.broadcast_to(X1, (2, 1, SIZE)),
    ),
    "6 embedding": (lambda ids: qg.take(dense(), ids, axis=0), mx.array([[1, 5, 9, 2]])),
    "7 three products of one dequantize": (
        lambda x: [(x * s) @ w for w in [dense().T] for s in (1.0, 2.0, 3.0)], X1,
    ),
    "8 split in three": (
        lambda x: [x @ p.T for p in qg.split(dense(), [512, 1024], axis=0)], X1,
    ),
    "8 three slices of one weight": (
        lambda x: [x @ w[i : i + 512].T for w in [dense()] for i in (0, 512, 1024)], X1,
    ),
    "8 columns of the transpose": (lambda x: x @ dense().T[:, :1024], X1),
    "9 fake quantization": (lambda x: x @ dense(qg.quantize(W)).T, X1),
    "dense before a loop of 8": (lambda x: outside(x), X1),
    "the same, 16 rows": (lambda x: outside(x), X16),
    "a stack quantized in its scan": (
        lambda x: qg.scan(lambda h, w: (qg.quantized_matmul(h, w), h[0, 0]), x, STACK)[0],
        X1[:, :512],
    ),
    "a weight quantized in a loop that carries it": (
        lambda x: qg.fori_loop(0, 8, lambda i, c: (qg.quantized_matmul(*c), c[1]), (x, SMALL))[0],
        X1[:, :512],
    ),
}  # fmt: skip


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes at the peak of a run beyond those held before it."""
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return int(mx.get_peak_memory() - held)


def main() -> None:
    mx.eval(W, Q, HALF, EXPERTS, SMALL, STACK)
    table = Table(title="as written and optimized", title_justify="left")
    for heading in ("case", "written ms", "ours ms", "ratio", "written MiB", "ours MiB"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    one_stream = [p for p in qg.default_passes() if p.name != "assign-streams"]
    ratios = {}
    for name, (fn, x) in CASES.items():
        graph = qg.trace(fn, x)
        written, ours = qg.compile(graph, passes=[]), qg.compile(graph, passes=one_stream)
        runs = {
            "written": lambda p=written, x=x: mx.eval(p(x)),
            "ours": lambda p=ours, x=x: mx.eval(p(x)),
        }
        results = interleaved(runs, repeats=7)
        ratios[name] = paired_ratio(results["ours"], results["written"])
        peaks = [peak_bytes(run) / 2**20 for run in runs.values()]
        table.add_row(name, *(milliseconds(r.median) for r in results.values()),
                      f"{ratios[name]:.3f}", *(f"{p:.1f}" for p in peaks))  # fmt: skip
    Console(width=110).print(table)
    print(f"slowest: {max(ratios.values()):.3f} of as written (at most 1.05)")
    decode = ratios["1 x @ dequantize(q).T"]
    print(f"plain decode, one stream: {1 / decode:.1f} times faster (at least 4)")


if __name__ == "__main__":
    main()
