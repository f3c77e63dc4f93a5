"""Casts around a product."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx

from qgraph.ir.graph import Node, Value
from qgraph.tracing.tensor import Tensor, apply
from qgraph.types import TensorType


def cast(x: Tensor, dtype: mx.Dtype) -> Tensor:
    """`x` in `dtype`; `x` itself where it is that already."""
    result: Tensor = x if x.dtype == dtype else apply("astype", (x, dtype))
    return result


def in_float32(node: Node, names: Collection[str]) -> Value:
    """The result of `node` with the operands `names` cast up to float32, and it cast down again.

    Packed integers among them stay as they are.
    """
    args = dict(node.args)
    for name in names:
        value = node.value(name)
        if value is not None and mx.issubdtype(value.dtype, mx.floating):
            args[name] = cast(Tensor(value), mx.float32).value
    wide = node.replace(args=args, types=[TensorType(node.output.shape, mx.float32)])
    return cast(Tensor(wide.output), node.output.dtype).value
