"""Indices that a graph out of a file computes, or is given, are held within what they index.

MLX reads and writes wherever an index points.  Those that are constants are checked once
(`analysis/indices`); for the others a `clip` stands before the node, unless the index cannot point
outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from ..analysis.indices import bounds, known_range
from ..ir.graph import Graph, Node, Value
from ..ir.loops import REGION, constants_behind
from ..rewrite.rewriter import Visit, rewrite, with_bodies
from ..tracing.tensor import Tensor, apply

_NAME = "hold-indices"


def guarded(graph: Graph) -> Graph:
    """The graph with its indices held, in bodies and regions too.

    >>> import mlx.core as mx, qgraph as qg
    >>> graph = qg.trace(lambda x, i: qg.take(x, i), qg.spec((4,)), qg.spec((2,), mx.int32))
    >>> print(guarded(graph).nodes[-1].inputs[1].node.op)
    clip
    """
    return _guarded(graph, constants_behind(graph))


def _guarded(graph: Graph, behind: Mapping[Value, Value]) -> Graph:
    def visitor(_: Graph) -> Visit:
        return lambda new, old: _visit(new, old, behind)

    return rewrite(graph, visitor, _NAME)


def _visit(new: Node, old: Node, behind: Mapping[Value, Value]) -> Sequence[Value] | None:
    if new.op == REGION:
        held = with_bodies(new, lambda body: _guarded(body, behind))
        return None if held is new else held.outputs
    here = dict(zip(old.inputs, new.inputs, strict=True))
    replace = {}
    for value, first, end in bounds(old):
        known = known_range(value, behind)
        if known is None or known[0] < first or known[1] >= end:
            replace[here[value]] = _held(here[value], first, end - 1)
    return new.with_inputs(replace).outputs if any(a is not b for a, b in replace.items()) else None


def _held(value: Value, first: int, last: int) -> Value:
    """The index between bounds, or itself where its dtype can hold no other."""
    if not mx.issubdtype(value.dtype, mx.integer):
        return value
    info = np.iinfo(str(value.dtype).rpartition(".")[2])
    if first <= info.min and info.max <= last:
        return value
    limits = max(first, info.min), min(max(last, first), info.max)
    held: Tensor = apply("clip", (Tensor(value), *limits))
    return held.value
