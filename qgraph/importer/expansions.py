"""What MLX makes of an op on CPUs: the primitives into which it expands some, as imported."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..errors import QGraphError
from ..ir.graph import Graph
from ..ir.ops import OPS
from ..types import Spec, TensorType
from . import from_mlx


def with_none(op: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, and None for those that MLX wants said.

    >>> with_none("fast.rms_norm", {"x": 1, "eps": 1e-5})
    {'x': 1, 'weight': None, 'eps': 1e-05}
    """
    parameters = OPS[op].signature.parameters.values()
    missing = dict.fromkeys(p.name for p in parameters if p.default is p.empty)
    return {**missing, **args}


@lru_cache(maxsize=4096)
def expansion(
    op: str,
    types: tuple[tuple[str, TensorType | tuple[TensorType, ...]], ...],
    settings: tuple[tuple[str, Any], ...],
) -> Graph | None:
    """MLX's expansion of an op on CPUs as an import records it; None if MLX refuses the call.

    Args:
        types: of its tensors, by parameter, of several such as `einsum`'s in a tuple; the graph's
            inputs, in this order.
        settings: its other arguments, by parameter.

    >>> types = (("x", TensorType((2, 8), mx.float32)),)
    >>> [node.op for node in expansion("fast.rms_norm", types, (("eps", 1e-5),)).nodes][-2:]
    ['broadcast_to', 'multiply']
    """

    def fn(*arrays: mx.array) -> Any:
        left = iter(arrays)
        tensors = {
            name: [next(left) for _ in type] if isinstance(type, tuple) else next(left)
            for name, type in types
        }
        return OPS[op].call(with_none(op, {**dict(settings), **tensors}), stream=mx.cpu)

    given = [t for _, type in types for t in (type if isinstance(type, tuple) else (type,))]
    try:
        return from_mlx(fn, *map(Spec, given), name=op)
    except (QGraphError, ValueError, TypeError):
        return None
