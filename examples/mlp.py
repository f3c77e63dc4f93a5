"""A two-layer perceptron from packed weights, with the dequantize written out.

    python examples/mlp.py

Each `x @ dequantize(w).T` becomes one quantized product; nothing dense is ever made.  The weights
are parameters here: other weights of the same types can be passed at every call.
"""

import mlx.core as mx

import qgraph as qg


def mlp(params, x):
    def dense(layer):
        w, scales, biases = layer["packed"]
        return qg.dequantize(w, scales, biases, group_size=64, bits=4)

    up, down = params["up"], params["down"]
    h = x @ dense(up).T + up["bias"]
    return (h * qg.sigmoid(h)) @ dense(down).T + down["bias"]


def layer(outputs, inputs, seed):
    w = mx.random.normal((outputs, inputs), key=mx.random.key(seed)) * inputs**-0.5
    return {"packed": list(mx.quantize(w, group_size=64, bits=4)), "bias": mx.zeros(outputs)}


params = {"up": layer(512, 128, 0), "down": layer(128, 512, 1)}
x = mx.random.normal((4, 128), key=mx.random.key(2))
program = qg.compile(mlp, params, x, parameters=[0])
print(program.plan.graph)
for entry in program.plan.ledger():
    print(entry)
print("same as untraced:", mx.allclose(program(params, x), mlp(params, x), atol=1e-4).item())
