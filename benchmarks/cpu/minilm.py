"""MiniLM: eight sentences of 64 tokens, float weights or packed ones."""

from __future__ import annotations

import mlx.core as mx

import qgraph as qg

from .peers import torch_encoder
from .row import Rates, Row, Run, evaluated


def minilm(bits: int, rates: Rates) -> Row:
    """Eight sentences of 64 tokens, float weights or packed ones."""
    from qgraph.examples import minilm as example

    model, _ = example.load()
    ids = mx.random.randint(100, 20000, (8, 64), key=mx.random.key(0))
    mask = mx.ones((8, 64), mx.int32)
    mx.eval(ids, mask)
    quantize = qg.Quantize(bits, 32) if bits else None
    program = qg.compile(qg.from_mlx(model, ids, mask), target="cpu", quantize=quantize)
    runs: dict[str, Run] = {"qgraph": evaluated(program, ids, mask)}
    if not bits:
        runs["MLX"] = evaluated(model, ids, mask)
        if (torch := torch_encoder()) is not None:
            runs["PyTorch"] = torch
    flops = 2 * 8 * 64 * 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 6 * 4 * 8 * 64 * 64 * 384
    return Row(f"MiniLM, {f'{bits} bits' if bits else 'float32'}", runs, flops / rates.flops)
