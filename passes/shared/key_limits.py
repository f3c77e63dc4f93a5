"""What a mask says of positions: which keys are seen, as a first and a last one and a window.

Masks of decoding compare the numbers of the keys, `arange(length)`, with positions: keys up to that
of the query, none before the padding, none older than a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qgraph.ir.graph import Node, Value
from qgraph.tracing.tensor import Tensor

from .views import is_plain, without_views

_AND = frozenset({"logical_and", "bitwise_and"})
_COMPARE = {"less_equal": (0, 1), "less": (1, 1), "greater_equal": (0, -1), "greater": (1, -1)}
"""Does equality fail, and which operand is the smaller: 1 the first, -1 the second."""


@dataclass(frozen=True)
class KeyLimits:
    """Keys that are seen.

    Attributes:
        last: position of the last query's last key, one for all or for each of the batch; the query
            before it sees one less.  None where nothing limits them.
        first: of the first key, likewise.
        window: how many at most; 0 for all.
        rest: truths of the mask that say more, in the mask's own terms.
    """

    last: Value | None = None
    first: Value | None = None
    window: int = 0
    rest: tuple[Value, ...] = ()


def key_limits(mask: Value, batch: int, queries: int, length: int) -> KeyLimits:
    """What a mask of truths over (batch, heads, queries, length) says."""
    lasts: list[tuple[_Limit, Value]] = []
    firsts: list[tuple[_Limit, Value]] = []
    rest = []
    for part in _parts(mask, length):
        limit = _limit(part, length)
        if limit is None:
            rest.append(part)
        else:
            (lasts if limit.upper else firsts).append((limit, part))
    last, first, window = None, None, 0
    kept = None
    for limit, part in lasts:
        found = None if last is not None else _last(limit, batch, queries)
        if found is None:
            rest.append(part)
        else:
            last, kept = found, limit
    for limit, part in firsts:
        if kept is not None and not window and limit.other is kept.other:
            window = kept.offset - limit.offset + 1
            if window >= 1:
                continue
            window = 0
        elif first is None and (first := _for_batch(limit, batch)) is not None:
            continue
        rest.append(part)
    return KeyLimits(last, first, window, tuple(rest))


@dataclass(frozen=True)
class _Limit:
    """key <= other + offset if `upper`, else key >= other + offset.

    Attributes:
        before: `other` with the views that show which axis it counts along.
    """

    upper: bool
    other: Value
    offset: int
    before: Value


def _parts(mask: Value, length: int) -> Iterator[Value]:
    """The truths of which all must hold, each of as many axes as in the mask or fewer."""
    value = _without_leading(mask)
    node = value.node
    if node.op in _AND and node.stream is None and mask.dtype == mx.bool_:
        for operand in node.inputs:
            yield from _parts(operand, length)
    else:
        yield value


def _without_leading(value: Value) -> Value:
    """Before views that only add or drop leading axes of 1."""
    while is_plain(value.node):
        source = value.node.inputs[0]
        if _stripped(source.shape) != _stripped(value.shape):
            break
        value = source
    return value


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    start = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return shape[start:]


def _limit(part: Value, length: int) -> _Limit | None:
    node = part.node
    if node.op not in _COMPARE or node.stream is not None or part.shape[-1:] != (length,):
        return None
    strict, smaller = _COMPARE[node.op]
    small, large = node.inputs[::smaller]
    for keys, other, upper in ((small, large, True), (large, small, False)):
        start = _counts_up(keys, length)
        if start is None or other.shape[-1:] not in ((), (1,)):
            continue
        if not mx.issubdtype(other.dtype, mx.integer):
            continue
        offset = -start - strict if upper else strict - start
        return _Limit(upper, without_views(other), offset, other)
    return None


def _last(limit: _Limit, batch: int, queries: int) -> Value | None:
    """The last key of the last query, if the queries before it see one less each."""
    if queries == 1:
        return _for_batch(limit, batch)
    if limit.other.type.size != queries or limit.before.shape[-2:-1] != (queries,):
        return None
    node = limit.other.node
    if node.op != "add" or node.stream is not None:
        return None
    for rows, place in (node.inputs, node.inputs[::-1]):
        start = _counts_up(without_views(rows), queries)
        if start is not None and place.type.size == 1:
            return _moved(place, start + queries - 1 + limit.offset)
    return None


def _for_batch(limit: _Limit, batch: int) -> Value | None:
    """A position for all, or along the first of four axes one for each of the batch."""
    size, shape = limit.other.type.size, limit.before.shape
    if size == 1 or (size == batch and shape == (batch, 1, 1, 1)):
        return _moved(limit.other, limit.offset)
    return None


def _moved(position: Value, by: int) -> Value:
    if by == 0:
        return position
    tensor = Tensor(position)
    if mx.issubdtype(position.dtype, mx.unsignedinteger):
        tensor = tensor.astype(mx.int64)
    return (tensor + by).value


def _counts_up(value: Value, length: int) -> int | None:
    """From which number on it counts up along its last axis, if it does."""
    node = without_views(value).node
    if value.type.size != length or value.shape[-1:] != (length,):
        return None
    if node.op == "add" and node.stream is None:
        for a, b in (node.inputs, node.inputs[::-1]):
            start, more = _counts_up(a, length), _number(b)
            if start is not None and more is not None and _holds(node, start + more, length):
                return start + more
        return None
    dtype = node.output.dtype
    if not mx.issubdtype(dtype, mx.integer):
        return None
    if node.op == "constant":
        data = node.args["data"]
        if data.is_released:
            return None
        numbers = np.asarray(data.array.reshape(-1)).astype(np.int64)
        start = int(numbers[0])
        return start if np.array_equal(numbers, np.arange(start, start + length)) else None
    if node.op != "arange":
        return None
    start, stop, step = (node.args.get(name) for name in ("start", "stop", "step"))
    first, end = (0, start) if stop is None else (start or 0, stop)
    counts = type(first) is int and (end, step or 1) == (first + length, 1)
    return first if counts and _holds(node, first, length) else None


def _holds(node: Node, start: int, length: int) -> bool:
    """Does no number of these wrap around?"""
    kind = mx.iinfo(node.output.dtype)
    return bool(kind.min <= start and start + length - 1 <= kind.max)


def _number(value: Value) -> int | None:
    node = without_views(value).node
    if node.op != "constant" or value.type.size != 1 or node.args["data"].is_released:
        return None
    if not mx.issubdtype(value.dtype, mx.integer):
        return None
    return int(node.args["data"].array.item())
