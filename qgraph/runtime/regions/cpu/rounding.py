"""Rows that are rounded to codes of 8 bits, before a product or for something else."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from ....ir.graph import Graph, Node
from ....tracing.functions import FUNCTIONS
from ....tracing.trace import trace
from ....types import Spec, TensorType
from ..unknown import Unknown
from .patterns import Rounded, packing
from .translate import PATTERNS, Translator, kind

ops = SimpleNamespace(**FUNCTIONS)


@kind("quantize")
def quantize(t: Translator, node: Node) -> None:
    mode, bits, group = packing(node)
    if (mode, bits) != ("affine", 8):
        raise Unknown("codes of other than 8 bits, made at every call")
    t.written_out(node, _rounding(node.operand("w").type, group), [node.operand("w")])


@lru_cache(maxsize=256)
def _rounding(type: TensorType, group: int) -> Graph:
    """Codes, scales and biases of rows, by MLX's own rule."""

    def codes(x: Any) -> tuple[Any, Any, Any]:
        groups = x.reshape(*type.shape[:-1], -1, group)
        low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
        step = ops.maximum((high - low) / 255, 1e-7)
        below = ops.abs(low) > ops.abs(high)
        step, edge = ops.where(below, step, -step), ops.where(below, low, high)
        whole = ops.round(edge / step)  # so that zero is one of the numbers
        step = ops.where(whole == 0, step, edge / whole)
        edge = ops.where(whole == 0, 0, edge)
        found = ops.clip(ops.round((groups - edge) / step), 0, 255).astype(mx.uint8)
        packed = found.reshape(type.shape).view(mx.uint32)
        return packed, step.squeeze(-1), edge.squeeze(-1)

    return trace(codes, Spec(type))


def rounded(t: Translator, pattern: Rounded) -> None:
    """Nothing is computed: products take what is to be rounded."""
    t.before_rounding[pattern.node.output] = pattern.quantize.operand("w")


PATTERNS[Rounded] = rounded
