"""mlx-lm's own methods at a number of bytes: dynamic_quant, GPTQ and AWQ, on the data given.

Each takes the bits for its layers that it has, then for the embedding, which is the head as well,
as many as still fit: a method has nothing better to do with bytes that are left.  On Linux CPUs MLX
multiplies with a reference BLAS; preload OpenBLAS (`LD_PRELOAD=libopenblas.so.0`) to have hours
back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

SIZE = 64
BITS = (2, 3, 4, 5, 6, 8)
_HALF = 2
"""Bytes of a scale."""


def dynamic(model: Any, data: mx.array, budget: int, kept: dict[Any, Any]) -> Any:
    """Layers by sensitivity: some in `high` bits, the others in `low` ones."""
    from mlx_lm.quant import dynamic_quant

    plain = [bits for bits in BITS if _bytes(model, lambda _, bits=bits: bits) <= budget]
    if not plain:
        return None
    exact = _bytes(model, lambda _: plain[-1]) > 0.98 * budget
    low = plain[-2] if exact and len(plain) > 1 else plain[-1]
    high = low + (2 if exact else 1)
    if exact and len(plain) == 1:
        return None  # all that two bits a number leave room for is plain
    if ("dynamic", low, high) not in kept:
        found = dynamic_quant.estimate_sensitivities(model, data, low, SIZE, high, SIZE, 4)
        kept["dynamic", low, high] = dict(found)
    sensitivities = kept["dynamic", low, high]
    # The threshold of the most layers in high bits that fit: as mlx-lm searches, but exact.
    for threshold in sorted({*sensitivities.values(), -1e30}):

        def bits(path: str, threshold: float = threshold) -> int:
            return high if sensitivities[path] > threshold else low

        if _bytes(model, bits) <= budget:
            return _packed(copy.deepcopy(model), bits)
    return None


def gptq(model: Any, data: mx.array, budget: int, kept: dict[Any, Any]) -> Any:
    """Layers by GPTQ in 2, 4 or 8 bits, which are all it has; the embedding rounded."""
    from mlx_lm.quant import gptq as method

    chosen = _layers_and_embedding(model, budget, (2, 4, 8))
    if chosen is None:
        return None
    bits, embedding = chosen
    if ("gptq", bits) not in kept:
        compensated = copy.deepcopy(model)
        kept["gptq", bits], _ = method.gptq_quantize(compensated, data, bits, SIZE, bits, SIZE)
    return _with_embedding(kept["gptq", bits], model, embedding)


def awq(model: Any, data: mx.array, budget: int, kept: dict[Any, Any]) -> Any:
    """Layers with AWQ's scales and clips; the embedding rounded.

    It runs each layer some fifty times on all data: it gets half of it, and half of the steps that
    are its default, for an hour instead of four.
    """
    from mlx_lm.quant import awq as method

    chosen = _layers_and_embedding(model, budget, BITS)
    if chosen is None:
        return None
    bits, embedding = chosen
    if ("awq", bits) not in kept:
        scaled = copy.deepcopy(model)
        method.awq_quantize(
            scaled, data[: len(data) // 2], method.llama_awq, group_size=SIZE, bits=bits,
            embed_group_size=SIZE, embed_bits=embedding, n_grid=10,
        )  # fmt: skip
        kept["awq", bits] = scaled
    return _with_embedding(kept["awq", bits], model, embedding)


def size_of(model: Any) -> int:
    """Bytes of all packed layers, with scales of float16."""
    return sum(
        m.weight.nbytes + _HALF * (m.scales.size + m.biases.size)
        for _, m in model.named_modules()
        if "scales" in m
    )


def half_scales(model: Any) -> Any:
    """The model with its scales and biases as float16 has them."""
    for _, m in model.named_modules():
        if "scales" in m:
            m.scales = m.scales.astype(mx.float16).astype(mx.float32)
            m.biases = m.biases.astype(mx.float16).astype(mx.float32)
    return model


def _layers(model: Any) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if hasattr(m, "to_quantized")}


def _bytes(model: Any, bits: Callable[[str], int]) -> int:
    """Of the model with so many bits for each of its layers."""
    return sum(
        m.weight.size * bits(path) // 8 + 2 * _HALF * m.weight.size // SIZE
        for path, m in _layers(model).items()
    )


def _packed(model: Any, bits: Callable[[str], int]) -> Any:
    def settings(path: str, module: Any) -> Any:
        return hasattr(module, "to_quantized") and {"group_size": SIZE, "bits": bits(path)}

    nn.quantize(model, class_predicate=settings)  # type: ignore[attr-defined]
    return model


def _layers_and_embedding(
    model: Any, budget: int, offered: tuple[int, ...]
) -> tuple[int, int] | None:
    """The most bits for layers, then for the embedding."""
    fitting = [
        (bits, embedding)
        for bits in offered
        for embedding in BITS
        if embedding >= bits
        and _bytes(model, lambda p, b=bits, e=embedding: e if "embed" in p else b) <= budget
    ]
    return max(fitting, default=None)


def _with_embedding(packed: Any, model: Any, bits: int) -> Any:
    packed = copy.deepcopy(packed)
    fresh = nn.QuantizedEmbedding.from_embedding(  # type: ignore[attr-defined]
        model.model.embed_tokens, group_size=SIZE, bits=bits
    )
    packed.model.embed_tokens = fresh
    return packed


METHODS: dict[str, Callable[..., Any]] = {"dynamic_quant": dynamic, "GPTQ": gptq, "AWQ": awq}
