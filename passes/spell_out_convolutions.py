"""A short convolution of each channel, of which one position is asked for, as products and sums.

So an SSM reads the last tokens for the next one.  MLX gives it to cuDNN, whose kernels are captured
anew at each call; what is written here is compiled into one kernel with the activation behind it.

Rewrites:
    1. CUDA: `conv_general` along one axis, of every channel by itself, as long as what it is given:
       a sum of a product for each position, taken in float32 as cuDNN does.
Leaves alone:
    1. several positions, padding, holes in input or kernel, and kernels longer than `MOST`.
    2. channels that are mixed, or made more.
    3. nodes with a stream of their own, and other targets: CPUs take such nodes into regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.ops import setting
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor

from .shared.casts import cast

MOST = 8
"""Positions: MLX compiles as many inputs into one kernel."""
_NAME = "spell-out-convolutions"


@dataclass(frozen=True)
class SpellOutConvolutions:
    """See the module."""

    target: Target | None = None
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        if as_target(self.target).backend != "cuda":
            return graph
        return rewrite_each(graph, _visit, self.name, ("conv_general",))


def _visit(node: Node) -> Sequence[Value] | None:
    x, weight = node.inputs
    if node.stream is not None or x.ndim != 3 or weight.shape[2] != 1:
        return None
    _, length, channels = x.shape
    plain = all(
        _all(setting(node, name), number)
        for name, number in (("padding", 0), ("kernel_dilation", 1), ("input_dilation", 1))
    )
    if weight.shape[:2] != (channels, length) or length > MOST:
        return None
    if not plain or setting(node, "flip") or setting(node, "groups") != channels:
        return None
    record(Entry.of(node, _NAME, "chosen", f"the sum of {length} products"))
    tokens, kernel = Tensor(x), cast(Tensor(weight), mx.float32)
    products = [cast(tokens[:, i : i + 1], mx.float32) * kernel[:, i, 0] for i in range(length)]
    return [cast(reduce(add, products), node.output.dtype).value]


def _all(numbers: object, number: int) -> bool:
    """Are all of a setting, however it is nested, the same number?"""
    if isinstance(numbers, list | tuple):
        return all(_all(one, number) for one in numbers)
    return numbers == number
