"""Stretches that `mx.compile` cannot build on CPUs, and which run node by node instead.

It writes the numbers that a fused kernel captures into C++, and a complex one that is not finite as
`complex64_t(nan, 0)`, where `nan` is a function (mlx 0.32.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx

from ..importer.expansions import expansion
from ..ir.graph import Node, Value


def breaks_compile(nodes: Sequence[Node], captured: Iterable[mx.array]) -> bool:
    """Would a compiled function of these nodes hold such a number?

    Args:
        captured: the arrays that the function captures.
    """
    return any(map(_is_odd, captured)) or any(map(_holds_odd, nodes))


def _is_odd(array: mx.array) -> bool:
    one = array.dtype == mx.complex64 and array.size == 1
    return one and not mx.isfinite(array).item()


def _holds_odd(node: Node) -> bool:
    """Among the constants of a loop's body, or of what MLX makes of an op, as of `median`."""
    if node.bodies:
        return any(_holds_odd(inner) for body in node.bodies for inner in body.nodes)
    made = [node] if node.op == "constant" or not _is_complex(node) else _expanded(node)
    return any(n.op == "constant" and _is_odd(n.args["data"].array) for n in made)


def _is_complex(node: Node) -> bool:
    return any(v.dtype == mx.complex64 for v in (*node.inputs, *node.outputs))


def _expanded(node: Node) -> Sequence[Node]:
    tensors: Mapping[str, Value] = {n: a for n, a in node.args.items() if isinstance(a, Value)}
    settings = tuple((n, a) for n, a in node.args.items() if n not in tensors)
    if len(tensors) < len(node.inputs) or not _is_hashable(settings):
        return ()  # of several arrays at once, or an index: MLX captures nothing for those
    found = expansion(node.op, tuple((n, v.type) for n, v in tensors.items()), settings)
    return () if found is None else found.nodes


def _is_hashable(thing: object) -> bool:
    try:
        hash(thing)
    except TypeError:
        return False
    return True
