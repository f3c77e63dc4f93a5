"""The place of the greatest number of a row: a phase of its own, in which each block sees a part.

MLX takes 20 µs for the logits of 128,256 tokens, in a launch of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from ....ir.graph import Node
from ....ir.ops import setting
from ..unknown import Unknown
from .attention import JOINS
from .expressions import FLOATS, TYPES, Leaf

OP = "argmax"
PLACES = (mx.uint32, mx.int32)
MOST_BLOCKS = 1024
"""Of a grid."""


@dataclass
class Pick:
    """A phase.

    Attributes:
        source: what rows are read from.
        width: of a row.
        parts: name of an array for what blocks find.
        writes: names of the arrays for the places, with their dtypes.
    """

    source: Leaf
    width: int
    parts: str
    writes: list[tuple[str, mx.Dtype]] = field(default_factory=list)

    def text(self, rows: int) -> Iterator[str]:
        place = f"n * {self.source.columns} + {self.source.offset}"
        yield f"for (int n = 0; n < {rows}; n++) {{"
        yield f"  pick_greatest<{self.width}>({self.source.name} + {place},"
        yield f"    {self.parts} + n * {2 * MOST_BLOCKS}, grid.counters + {JOINS} + n, sums,"
        yield "    [&](int place) {"
        for name, dtype in self.writes:
            yield f"      {name}[n] = {TYPES[dtype]}(place);"
        yield "    });"
        yield "}"


def is_pick(node: Node) -> bool:
    """Does a node pick a place, or make one of another dtype?"""
    return node.op == OP or (node.op == "astype" and node.inputs[0].node.op == OP)


def check_pick(node: Node) -> None:
    """Has it a place in a region?

    Raises:
        Unknown: it has none.
    """
    if node.stream is not None:
        raise Unknown("it has a stream of its own")
    if node.output.dtype not in PLACES:
        raise Unknown(f"a result of {node.output.type}")
    x, axis = node.inputs[0], setting(node, "axis") if node.op == OP else -1
    if node.op != OP:
        return
    if axis is None or axis % x.ndim != x.ndim - 1 or x.dtype not in FLOATS or x.shape[-1] % 8:
        raise Unknown(f"an {OP} of {x.type} along axis {axis}")
