"""Nodes out of ops and values, their types as MLX infers them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..errors import QGraphError, ShapeError
from ..ir.graph import Node, StreamLike, Value, map_values
from ..ir.op import Op
from ..ir.ops import OPS
from ..origin import user_frame
from ..types import TensorType, type_of
from .fatal import fatal


@lru_cache(maxsize=4096)
def placeholder(type: TensorType) -> mx.array:
    """An array of this type that is never evaluated; MLX's functions infer types from it."""
    return mx.zeros(type.shape, type.dtype)


def beside(thing: Any, like: mx.Dtype) -> mx.array:
    """What MLX makes of a number or a NumPy array beside an operand of dtype `like`.

    MLX itself is asked for the dtype, by a choice between the two.

    Raises:
        ValueError: an integer is out of the range of `like`.

    >>> beside(2, mx.float16), beside(0.5, mx.int32)
    (array(2, dtype=float16), array(0.5, dtype=float32))
    """
    dtype = mx.where(True, thing, placeholder(TensorType((), like))).dtype
    return mx.array(thing, dtype)


Several = Callable[[Iterable[Any]], Any] | None
"""What MLX returns several results in, `list` or `tuple`; None for one result."""


def infer(op: Op, args: Mapping[str, Any]) -> tuple[list[TensorType], Several]:
    """Types of the op's outputs, by MLX itself, and what MLX returns them in."""
    if (reason := fatal(op.name, args)) is not None:
        raise ShapeError(f"{op.name}: {reason}", hint=f"its parameters are {op}")
    symbolic = {n: map_values(a, lambda v: placeholder(v.type)) for n, a in args.items()}
    try:
        result = op.call(symbolic)
    except QGraphError:
        raise
    except Exception as error:
        types = [str(v.type) for a in args.values() for v in _values(a)]
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ShapeError(
            f"{op.name} cannot take {', '.join(types)}: {words}",
            hint=f"its parameters are {op}",
        ) from None
    if isinstance(result, mx.array):
        return [type_of(result)], None
    return [type_of(array) for array in result], list if isinstance(result, list) else tuple


def _values(arg: Any) -> list[Value]:
    found: list[Value] = []
    map_values(arg, lambda v: found.append(v) or v)  # type: ignore[func-returns-value]
    return found


def make_node(
    name: str, args: Mapping[str, Any], *, stream: StreamLike = None, **fields: Any
) -> tuple[Node, Several]:
    """A node for values in their places, and what MLX returns its results in."""
    types, several = infer(OPS[name], args)
    fields.setdefault("origin", user_frame())
    if isinstance(stream, mx.DeviceType):  # mx.cpu, of which nodes know one spelling
        stream = mx.Device(stream, 0)
    return Node(name, args, types, stream=stream, inferred=True, **fields), several
