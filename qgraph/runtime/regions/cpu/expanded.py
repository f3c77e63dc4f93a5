"""Ops that the engine has no work for, as MLX makes them of others."""

from __future__ import annotations

from typing import Any

from ....importer.expansions import expansion
from ....ir.graph import Graph, Node, Value, map_values
from ....ir.ops import OPS, RANDOM
from ....types import TensorType
from ..unknown import Unknown

_ALONE = frozenset(
    name for name, op in OPS.items() if op.kind in ("quantization", "chosen kernels", "collective")
)
"""Ops that are expanded in no way that the engine would gain by."""


def expanded(node: Node) -> tuple[Graph, list[Value]]:
    """A graph that computes what a node does, and the values that it is given.

    Raises:
        Unknown: there is none that would help.
    """
    tensors: dict[str, Value | tuple[Value, ...]] = {}
    settings = []
    for name, arg in node.args.items():
        if isinstance(arg, Value) or _are_values(arg):
            tensors[name] = arg
        elif _holds_values(arg):
            raise Unknown(f"there is no kind of work for {node.op} of such arguments")
        else:
            settings.append((name, arg))
    unknown = Unknown(f"there is no kind of work for {node.op}")
    if node.op in _ALONE or node.bodies:
        raise unknown
    if node.op in RANDOM and "key" not in tensors:
        raise Unknown(f"{node.op} without a key")
    try:
        types = tuple((name, map_values(v, _type)) for name, v in tensors.items())
        graph = expansion(node.op, types, tuple(settings))
    except TypeError:  # settings that are no key, such as slices
        raise unknown from None
    if graph is None or any(n.op in (node.op, *_ALONE) or n.bodies for n in graph.nodes):
        raise unknown
    if [v.type for v in graph.outputs] != [v.type for v in node.outputs]:
        raise unknown
    given = [v for arg in tensors.values() for v in (arg if isinstance(arg, tuple) else (arg,))]
    return graph, given


def _holds_values(arg: Any) -> bool:
    return isinstance(arg, tuple) and any(isinstance(a, Value) or _holds_values(a) for a in arg)


def _are_values(arg: Any) -> bool:
    return isinstance(arg, tuple) and bool(arg) and all(isinstance(a, Value) for a in arg)


def _type(value: Value) -> TensorType:
    return value.type
