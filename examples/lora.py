"""Adapters of low rank (LoRA) trained beside weights that stay packed in 4 bits.

    python examples/lora.py

The packed weights are constants of the program, the adapters an argument.  `mx.value_and_grad` goes
through the program: where it calls, MLX's own products take the place of kernels that MLX cannot
differentiate.
"""

import mlx.core as mx
import mlx.optimizers as optim

import qgraph as qg

SIZE, RANK, LAYERS = 256, 8, 3
keys = mx.random.split(mx.random.key(0), 2 * LAYERS + 2)
weights = [mx.random.normal((SIZE, SIZE), key=key) / SIZE**0.5 for key in keys[:LAYERS]]


def model(adapters, x):
    """y = tanh(W x + B A x) for each layer, W packed."""
    for w, adapter in zip(weights, adapters.values(), strict=True):
        x = qg.tanh(qg.quantized_matmul(x, w) + (x @ adapter["a"]) @ adapter["b"])
    return x


program = qg.jit(model)


def loss(adapters, x, y):
    return mx.mean(mx.square(program(adapters, x) - y))


adapters = {
    f"layer {i}": {
        "a": mx.random.normal((SIZE, RANK), key=key) / SIZE**0.5,
        "b": mx.zeros((RANK, SIZE)),
    }
    for i, key in enumerate(keys[LAYERS : 2 * LAYERS])
}
x = mx.random.normal((64, SIZE), key=keys[-1])
turned = mx.random.normal((SIZE, 2), key=keys[-2]) / SIZE**0.5
y = program(adapters, x + x @ turned @ turned.T)  # what the model should have said

step = mx.value_and_grad(loss)
_, gradients = step(adapters, x, y)
_, expected = mx.value_and_grad(lambda a: mx.mean(mx.square(model(a, x) - y)))(adapters)
same = [
    mx.allclose(gradients[layer][name], expected[layer][name], rtol=1e-3, atol=1e-6).item()
    for layer in expected
    for name in "ab"
]
print("gradients as without a program:", all(same))

optimizer = optim.Adam(learning_rate=3e-3)
before = loss(adapters, x, y).item()
for _ in range(100):
    value, gradients = step(adapters, x, y)
    adapters = optimizer.apply_gradients(gradients, adapters)
    mx.eval(adapters, optimizer.state)
after = loss(adapters, x, y).item()
print(f"loss {before:.1e} before, {after:.1e} after 100 steps")
print("learned:", after < before / 3)
kept, floats = program.weight_bytes, sum(w.nbytes for w in weights)
print(f"{kept} bytes of weights packed, {floats} as floats")
