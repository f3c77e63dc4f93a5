"""SmolLM2-135M: tokens one by one, prompts, and the same model imported from mlx-lm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

import qgraph as qg

from .peers import llama_cpp, on_one_core
from .row import Rates, Row, Run

STEPS = 8


def smollm2(kind: str, rates: Rates, rounded: bool = False) -> Row:
    """Tokens after a prompt, or a prompt of some tokens, its rows rounded to 8 bits or not."""
    from qgraph.examples import smollm2 as example
    from qgraph.examples import smollm2_files as files

    found = files.load()
    model = example.Llama(found.config, found.weights, length=1024)
    nbytes = sum(int(w.nbytes) for w in found.weights.values())
    theirs = files.mlx_lm_model(found.weights, found.config)
    if kind == "decode":
        return _decode(model, theirs, found, nbytes, rates)
    count = int(kind.removeprefix("prompt-"))
    ids = [i * 7 % 4000 + 5 for i in range(count)]
    quantize = qg.Quantize(where={}, activations=8) if rounded else None
    ours = _prompt(model, ids, quantize)
    runs: dict[str, Run] = {"qgraph": ours}
    error: Any = None
    if rounded:
        exact = _prompt(model, ids)()
        error = (mx.linalg.norm(ours() - exact) / mx.linalg.norm(exact)).item()
    else:
        runs["MLX"] = _mlx_prompt(theirs, ids)
    runs["one core"] = on_one_core(runs["qgraph"])
    if (llama := llama_cpp()) is not None:
        runs["llama.cpp"] = lambda: (llama.reset(), llama.eval(ids))
    floor = 2 * count * _weights(found) / rates.flops
    name = f"SmolLM2, prompt of {count}{', 8 bits' if rounded else ''}"
    return Row(name, runs, floor, error=error)


def _prompt(model: Any, ids: Sequence[int], quantize: Any = None) -> Callable[[], mx.array]:
    """Reads a prompt into a cache that it hands over, as a chat does; gives the logits."""
    program = qg.jit(model.prefill, target="cpu", quantize=quantize, donate=[2])
    tokens, length, state = mx.array([ids]), mx.array(len(ids), mx.int32), [model.empty_cache()]

    def run() -> mx.array:
        logits: mx.array
        logits, state[0] = program(tokens, length, state[0])
        mx.eval(logits, state[0])
        return logits

    return run


def _decode(model: Any, theirs: Any, found: Any, nbytes: int, rates: Rates) -> Row:
    program = qg.jit(model.decode(STEPS), target="cpu", donate=[3])
    start = [i * 7 % 4000 + 5 for i in range(16)]
    state = [mx.array(7, mx.int32), mx.array(16, mx.int32), mx.random.key(0), model.empty_cache()]

    def ours() -> None:
        carry, _ = program(*state)
        mx.eval(carry)
        state[3] = carry[3]  # at the same position each time

    runs: dict[str, Run] = {"qgraph": ours, "MLX": _mlx_steps(theirs, start),
                            "one core": on_one_core(ours)}  # fmt: skip
    if (llama := llama_cpp()) is not None:

        def steps() -> None:
            llama.n_tokens = len(start)
            for i in range(STEPS):
                llama.eval([i + 7])

        llama.reset()
        llama.eval(start)
        runs["llama.cpp"] = steps
    return Row("SmolLM2, decode", runs, STEPS * nbytes / rates.copy, STEPS)


def _weights(found: Any) -> int:
    c = found.config
    kv = c.kv_heads * c.head_dim
    return int(c.layers * c.hidden * (2 * c.hidden + 2 * kv + 3 * c.ffn))


def _mlx_prompt(model: Any, ids: Sequence[int]) -> Run:
    from mlx_lm.models.cache import make_prompt_cache

    return lambda: mx.eval(model(mx.array([ids]), cache=make_prompt_cache(model))[:, -1])


def _mlx_steps(model: Any, start: Sequence[int]) -> Run:
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([start]), cache=cache))

    def steps() -> None:
        for i in range(STEPS):
            mx.eval(model(mx.array([[i + 7]]), cache=cache))
        for layer in cache:
            layer.trim(STEPS)

    return steps


def imported(rates: Rates) -> Row:
    """A step of the same model imported from mlx-lm."""
    from mlx_lm.models.cache import make_prompt_cache

    from qgraph.examples import smollm2_files as files

    found = files.load()
    theirs = files.mlx_lm_model(found.weights, found.config)
    fast = qg.lm.accelerate(theirs, background=False)  # programs are waited for
    cache = make_prompt_cache(fast)
    mx.eval(fast(mx.array([[5, 6, 7]]), cache=cache))

    def step(model: Any, cache: Any) -> Run:
        def run() -> None:
            mx.eval(model(mx.array([[7]]), cache=cache))
            for layer in cache:
                layer.trim(1)

        return run

    plain = files.mlx_lm_model(found.weights, found.config)
    other = make_prompt_cache(plain)
    mx.eval(plain(mx.array([[5, 6, 7]]), cache=other))
    nbytes = sum(int(w.nbytes) for w in found.weights.values())
    runs = {"qgraph": step(fast, cache), "MLX": step(plain, other)}
    return Row("SmolLM2 of mlx-lm, a step", runs, nbytes / rates.copy)
