"""What stands beyond the end of a value whose parts reach beyond it.

Parts are equally long, so where a length does not divide the last ones hold more than there is.
That must not reach a sum: it is followed through the graph (`exp` makes 1 of 0), and where it is
not known, or matters, a number is put there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from qgraph.analysis.placements import Placement
from qgraph.analysis.placements.strategies import Strategy
from qgraph.ir.graph import Node, Value, constant_value, is_scalar, map_values
from qgraph.ir.kinds import SAME_ELEMENTS
from qgraph.ir.ops import OPS
from qgraph.tracing.tensor import Tensor, apply

from .ranks import Rank

_LAYOUT = SAME_ELEMENTS | {
    "getitem",
    "slice",
    "concatenate",
    "split",
    "stack",
    "take",
    "slice_update",
}
"""Ops that move elements: where all their operands are padded with one number, so are they."""

_KEEPS_ZEROS = frozenset({"fast.rope", "fast.rms_norm", "quantize", "dequantize", "zeros"})

_PRODUCT_KINDS = frozenset({"product", "quantization", "convolution"})


class Padding:
    """The number that stands beyond the end of each local value, where it is known."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._pads: dict[Value, float] = {}

    def is_padded(self, value: Value, place: Placement) -> bool:
        return place.kind == "split" and value.shape[place.axis] != place.size * self._rank.ranks

    def zeros(self, local: Value) -> None:
        """Zeros stand there: it is a part taken of a whole value."""
        self._pads[local] = 0.0

    def filled(self, value: Value, local: Value, place: Placement, number: float) -> Value:
        """The part with `number` wherever it reaches beyond the value's end."""
        if not self.is_padded(value, place) or self._pads.get(local) == number:
            return local
        numbers = Tensor(constant_value(mx.arange(place.size, dtype=mx.int32)))
        inside = apply(
            "less", (numbers + self._rank.first_row(place.size), value.shape[place.axis])
        )
        after = value.ndim - 1 - place.axis
        inside = apply("reshape", (inside, (place.size, *(1,) * after)))
        other = Tensor(constant_value(mx.array(number, local.dtype)))
        found: Value = apply("where", (inside, Tensor(local), other)).value
        self._pads[found] = number
        return found

    def kept_out(self, node: Node, way: Strategy, local: list[Value]) -> list[Value]:
        """Operands whose padding adds nothing to a sum along the split axis."""
        padded = [i for i in way.contracted if self.is_padded(node.inputs[i], way.needs[i])]
        if not padded:
            return local
        pads = {i: self._pads.get(local[i]) for i in padded}
        found = list(local)
        finite = all(p is not None and math.isfinite(p) for p in pads.values())
        if finite and 0.0 in pads.values():
            return local
        for i in padded:
            if pads[i] is None or not math.isfinite(pads[i] or 0.0) or 0.0 not in pads.values():
                found[i] = self.filled(node.inputs[i], local[i], way.needs[i], 0.0)
                pads[i] = 0.0
        return found

    def follow(self, node: Node, way: Strategy, local: Sequence[Value], new: Node) -> None:
        """Note what stands in the results of an op on what a rank holds."""
        for out, value, place in zip(new.outputs, node.outputs, way.gives, strict=True):
            if self.is_padded(value, place):
                number = self._after(node, way, local)
                if number is not None:
                    self._pads[out] = number

    def _after(self, node: Node, way: Strategy, local: Sequence[Value]) -> float | None:
        """The number that stands in a result's padding; None where it may be any."""
        if node.op in ("zeros", "zeros_like"):
            return 0.0
        here = [v for v, p in zip(local, way.needs, strict=True) if p.kind == "split"]
        pads = {self._pads.get(v) for v in here}
        if not here:
            return None
        if pads == {0.0} and (node.op in _KEEPS_ZEROS or OPS[node.op].kind in _PRODUCT_KINDS):
            return 0.0
        if node.op == "fast.scaled_dot_product_attention" and pads == {0.0}:
            return 0.0
        if node.op in _LAYOUT:
            return pads.pop() if len(pads) == 1 else None
        if OPS[node.op].kind.startswith("elementwise") and None not in pads:
            return self._elementwise(node, way, local)
        return None

    def _elementwise(self, node: Node, way: Strategy, local: Sequence[Value]) -> float | None:
        numbers: list[mx.array] = []
        for value, place, new in zip(node.inputs, way.needs, local, strict=True):
            if place.kind == "split":
                numbers.append(mx.array(self._pads[new], value.dtype))
            elif is_scalar(value):
                numbers.append(value.node.args["data"].array)
            else:
                return None
        given = iter(numbers)
        args = {n: map_values(a, lambda _: next(given)) for n, a in node.args.items()}
        result = OPS[node.op].call(args)
        if isinstance(result, mx.array) and mx.issubdtype(result.dtype, mx.floating):
            return float(result.item())  # type: ignore[arg-type]
        return None
