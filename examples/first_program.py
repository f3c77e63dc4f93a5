"""A first program: trace, look, optimize, look again, run.

python examples/first_program.py
"""

import mlx.core as mx

import qgraph as qg

w = mx.random.normal((256, 256), key=mx.random.key(0)) / 16


def model(x):
    """Sixty-four steps that each quantize the same weight, as one would write it."""
    return qg.fori_loop(0, 64, lambda i, h: qg.tanh(qg.quantized_matmul(h, w)), x)


graph = qg.trace(model, qg.spec((1, 256)))
print(graph)
plan = qg.optimize(graph)
print(plan.graph)

program = qg.compile(graph)
x = mx.random.normal((1, 256), key=mx.random.key(1))
print("same as untraced:", mx.allclose(program(x), model(x), atol=1e-5).item())
