"""Ops that need an axis whole, carried out on its parts with a few numbers from each rank.

The next token of logits that are split by vocabulary: each rank sends its largest and where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ...ir.graph import Node, Value
from ...ir.ops import setting
from ...tracing.tensor import Tensor, apply
from .placement import PARTIAL, REPLICATED, Placement, split
from .strategies import Strategy
from .units import Units

_EXACT_IN_FLOAT = 1 << 24
"""Below it every integer is a float32."""


def across(node: Node, units: Units) -> Iterator[Strategy]:
    """Ways to carry out a node on parts of the axis that it needs whole."""
    rule = _RULES.get(node.op)
    axis = None if rule is None or not node.inputs else _axis(node, node.inputs[0])
    if rule is None or axis is None:
        return
    x = node.inputs[0]
    if mx.issubdtype(x.dtype, mx.floating) and (size := units.length(x, axis)):
        yield from rule(node, axis, split(axis, size), units.ranks)


def _axis(node: Node, x: Value) -> int | None:
    """The one axis that a reduction is over, or a norm."""
    if not x.ndim:
        return None
    if node.op == "fast.rms_norm":
        return x.ndim - 1
    axis = setting(node, "axis")
    if axis is None:
        return 0 if x.ndim == 1 else None
    if isinstance(axis, tuple):
        return axis[0] % x.ndim if len(axis) == 1 else None
    return int(axis) % x.ndim


def _argmax(node: Node, axis: int, place: Placement, ranks: int) -> Iterator[Strategy]:
    x = node.inputs[0]
    if x.dtype == mx.float64 or x.shape[axis] >= _EXACT_IN_FLOAT:
        return
    least = node.op == "argmin"

    def build(emit: Any, node: Node, local: Sequence[Value]) -> list[Value]:
        worst = float("inf") if least else -float("inf")
        found = Tensor(emit.padding.filled(x, local[0], place, worst))
        return [_largest(emit, -found if least else found, axis, place.size, node)]

    others = (REPLICATED,) * (len(node.inputs) - 1)
    talk = (("all_gather", 8 * ranks * node.output.type.size),)
    yield Strategy((place, *others), (REPLICATED,), 1 / ranks, build=build, talks=talk)


def _largest(emit: Any, x: Tensor, axis: int, size: int, node: Node) -> Value:
    """The number of the largest element along the split axis; the first of several."""
    here = apply("argmax", (x,), {"axis": axis, "keepdims": True})
    most = apply("take_along_axis", (x, here), {"axis": axis}).astype(mx.float32)
    number = (here.astype(mx.int32) + emit.rank.first_row(size)).astype(mx.float32)
    sent = apply("stack", ([most, number], 0))
    every = Tensor(emit.collectives.gathered(sent.value, node))  # (ranks, 2, …)
    rank = apply("argmax", (every[:, 0],), {"axis": 0, "keepdims": True})
    found = apply("take_along_axis", (every[:, 1], rank), {"axis": 0})[0]
    if found.shape != node.output.shape:
        found = apply("reshape", (found, node.output.shape))
    value: Value = found.astype(node.output.dtype).value
    return value


def _categorical(node: Node, axis: int, place: Placement, ranks: int) -> Iterator[Strategy]:
    """The largest of logits and Gumbel's noise, which is drawn whole: as on one device."""
    x = node.inputs[0]
    plain = all(node.args.get(name) is None for name in ("shape", "num_samples"))
    if not plain or x.dtype != mx.float32 or axis != x.ndim - 1:
        return
    if x.shape[axis] >= _EXACT_IN_FLOAT:
        return

    def build(emit: Any, node: Node, local: Sequence[Value]) -> list[Value]:
        key = Tensor(local[1])
        noise = apply("random.gumbel", (), {"shape": x.shape, "dtype": x.dtype, "key": key})
        noisy = Tensor(local[0]) + Tensor(emit.part_of(noise.value, place))
        found = Tensor(emit.padding.filled(x, noisy.value, place, -float("inf")))
        return [_largest(emit, found, axis, place.size, node)]

    talk = (("all_gather", 8 * ranks * node.output.type.size),)
    yield Strategy((place, REPLICATED), (REPLICATED,), 1 / ranks, build=build, talks=talk)


def _extreme(node: Node, axis: int, place: Placement, ranks: int) -> Iterator[Strategy]:
    x = node.inputs[0]
    worst = -float("inf") if node.op == "max" else float("inf")

    def build(emit: Any, node: Node, local: Sequence[Value]) -> list[Value]:
        given = Tensor(emit.padding.filled(x, local[0], place, worst))
        keep = bool(setting(node, "keepdims"))
        most = apply(node.op, (given,), {"axis": axis, "keepdims": keep})
        return [emit.collectives.within(f"all_{node.op}", most.value, node)]

    talk = (("all_max", node.output.type.nbytes),)
    yield Strategy((place,), (REPLICATED,), 1 / ranks, build=build, talks=talk)


def _mean(node: Node, axis: int, place: Placement, ranks: int) -> Iterator[Strategy]:
    """The ranks' sums over the whole length: partial sums."""
    x = node.inputs[0]

    def build(emit: Any, node: Node, local: Sequence[Value]) -> list[Value]:
        given = Tensor(emit.padding.filled(x, local[0], place, 0.0))
        keep = bool(setting(node, "keepdims"))
        total = apply("sum", (given,), {"axis": axis, "keepdims": keep})
        return [(total / x.shape[axis]).value]

    yield Strategy((place,), (PARTIAL,), 1 / ranks, build=build)


def _rms_norm(node: Node, axis: int, place: Placement, ranks: int) -> Iterator[Strategy]:
    """Squares are summed over the ranks, one number a row."""
    x, *weight = node.inputs
    rows = x.type.size // x.shape[-1]

    def build(emit: Any, node: Node, local: Sequence[Value]) -> list[Value]:
        wide = Tensor(emit.padding.filled(x, local[0], place, 0.0)).astype(mx.float32)
        squares = apply("sum", (apply("square", (wide,)),), {"axis": -1, "keepdims": True})
        total = Tensor(emit.collectives.within("all_sum", squares.value, node))
        scaled = wide * apply("rsqrt", (total / x.shape[-1] + node.args["eps"],))
        result = scaled.astype(x.dtype)
        if weight:
            result = result * Tensor(local[1])
        return [result.astype(node.output.dtype).value]

    needs = (place, *(split(0, place.size) for _ in weight))
    talk = (("all_sum", 4 * rows),)
    yield Strategy(needs, (place,), 1 / ranks, build=build, talks=talk)


def _softmax(node: Node, axis: int, place: Placement, ranks: int) -> Iterator[Strategy]:
    """The largest of a row, then the sum of its powers: two numbers a row from each rank."""
    x = node.inputs[0]

    def build(emit: Any, node: Node, local: Sequence[Value]) -> list[Value]:
        powers, _, total = _powers(emit, node, local[0], axis, place)
        result: Value = (powers / total).astype(node.output.dtype).value
        emit.padding.zeros(result)
        return [result]

    yield Strategy((place,), (place,), 1 / ranks, build=build, talks=_of_rows(x, axis))


def _logsumexp(node: Node, axis: int, place: Placement, ranks: int) -> Iterator[Strategy]:
    x = node.inputs[0]

    def build(emit: Any, node: Node, local: Sequence[Value]) -> list[Value]:
        _, most, total = _powers(emit, node, local[0], axis, place)
        result = (most + apply("log", (total,))).astype(node.output.dtype)
        if result.shape != node.output.shape:
            result = apply("reshape", (result, node.output.shape))
        return [result.value]

    yield Strategy((place,), (REPLICATED,), 1 / ranks, build=build, talks=_of_rows(x, axis))


def _powers(
    emit: Any, node: Node, local: Value, axis: int, place: Placement
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x - most) of a rank's part, the largest of each whole row, and the sum over all ranks."""
    filled = emit.padding.filled(node.inputs[0], local, place, -float("inf"))
    wide, over = Tensor(filled).astype(mx.float32), {"axis": axis, "keepdims": True}
    most = Tensor(emit.collectives.within("all_max", apply("max", (wide,), over).value, node))
    powers = apply("exp", (wide - most,))
    total = emit.collectives.within("all_sum", apply("sum", (powers,), over).value, node)
    return powers, most, Tensor(total)


def _of_rows(x: Value, axis: int) -> tuple[tuple[str, int], ...]:
    nbytes = 4 * x.type.size // x.shape[axis]
    return ("all_max", nbytes), ("all_sum", nbytes)


_RULES: dict[str, Callable[[Node, int, Placement, int], Iterator[Strategy]]] = {
    "argmax": _argmax,
    "argmin": _argmax,
    "random.categorical": _categorical,
    "max": _extreme,
    "min": _extreme,
    "mean": _mean,
    "fast.rms_norm": _rms_norm,
    "softmax": _softmax,
    "logsumexp": _logsumexp,
}
