"""The slow case of MLX's R interface, made fast: a float weight quantized in a loop.

    python examples/loop_quantization.py

`quantized_matmul` given a float weight quantizes it at every call.  As a graph, the quantization
leaves the loop and runs once, in the pack step.
"""

import time

import mlx.core as mx

import qgraph as qg

STEPS, SIZE = 32, 512
w = mx.random.normal((SIZE, SIZE), key=mx.random.key(0)) * SIZE**-0.5
x = mx.random.normal((1, SIZE), key=mx.random.key(1))


def loop(x):
    return qg.fori_loop(0, STEPS, lambda i, h: qg.tanh(qg.quantized_matmul(h, w)), x)


def milliseconds(run):
    mx.eval(run())
    start = time.perf_counter()
    mx.eval(run())
    return 1000 * (time.perf_counter() - start)


program = qg.compile(loop, x)
print(program.plan.report())
slow, fast = milliseconds(lambda: loop(x)), milliseconds(lambda: program(x))
print(f"as written {slow:.1f} ms, compiled {fast:.1f} ms: {slow / fast:.1f} times faster")
print("same result:", mx.allclose(loop(x), program(x), atol=1e-5).item())
