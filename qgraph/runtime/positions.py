"""On CPUs: what RoPE and causal attention compute from positions alone, computed once for all.

There MLX expands these ops wherever they are called, so that each layer has cosines, sines and
masks of its own.  `mx.compile` cannot merge them, as they begin with `arange`, which has no inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..importer.expansions import expansion
from ..ir.graph import Graph, Node, Value, map_values
from ..ir.ops import OPS
from ..types import type_of

_TENSORS = {
    "fast.rope": ("a",),
    "fast.scaled_dot_product_attention": ("q", "k", "v", "mask", "sinks"),
}
"""Operands that differ from layer to layer; what depends on none of them is a table."""

_MAX_BYTES = 1 << 16
"""Tables that depend on no operand at all are computed while compiling, up to this size."""


def has_tables(node: Node, device: mx.Device) -> bool:
    """Does MLX compute a table at each call of this op?"""
    if device.type != mx.DeviceType.cpu or node.stream is not None:
        return False
    return node.op == "fast.rope" or (node.op in _TENSORS and node.args.get("mask") == "causal")


def expand_ahead(nodes: Sequence[Node], device: mx.Device) -> None:
    """Expand what `Tables` will need: within `mx.compile` nothing can be imported."""
    for node in nodes:
        if has_tables(node, device):
            tensors = {n: a for n, a in node.args.items() if isinstance(a, Value)}
            _expansion(node, {name: value.type for name, value in tensors.items()})
        for body in node.bodies:
            expand_ahead(body.nodes, device)


class Tables:
    """Calls ops by their expansions, with one array for all tables that are the same."""

    def __init__(self) -> None:
        # The inputs are kept with a result, so that their identities stay theirs.
        self._made: dict[Any, tuple[list[mx.array], mx.array]] = {}
        self._known: set[int] = set()

    def call(self, node: Node, args: Mapping[str, Any]) -> mx.array | None:
        """The result of a node for its arguments; None if it was not expanded ahead."""
        arrays = {name: arg for name, arg in args.items() if isinstance(arg, mx.array)}
        pattern = _expansion(node, {name: type_of(a) for name, a in arrays.items()})
        if pattern is None:
            return None
        env = dict(zip(pattern.inputs, arrays.values(), strict=True))
        wide = _not_tables(pattern, tuple(n in _TENSORS[node.op] for n in arrays))
        for inner in pattern.nodes:
            if inner in wide:
                env[inner.output] = _run(inner, env)
            else:
                env[inner.output] = self._shared(inner, env)
        return env[pattern.outputs[0]]

    def _shared(self, node: Node, env: Mapping[Value, mx.array]) -> mx.array:
        inputs = [env[v] for v in node.inputs]
        what = node.args["data"].array.item() if node.op == "constant" else node.attrs
        key = (node.op, str(node.output.type), repr(what), *map(id, inputs))
        if key not in self._made:
            result = _run(node, env)
            if result.nbytes <= _MAX_BYTES and all(id(array) in self._known for array in inputs):
                result = mx.contiguous(result)  # as files want it, see runtime/export
                mx.eval(result)  # now, and not at each call
                self._known.add(id(result))
            self._made[key] = inputs, result
        return self._made[key][1]


def _run(node: Node, env: Mapping[Value, mx.array]) -> mx.array:
    if node.op == "constant":
        array: mx.array = node.args["data"].array
        return array
    args = {name: map_values(arg, env.__getitem__) for name, arg in node.args.items()}
    result: mx.array = OPS[node.op].call(args)
    return result


def _expansion(node: Node, types: Mapping[str, Any]) -> Graph | None:
    settings = tuple((n, a) for n, a in node.args.items() if n not in types)
    return expansion(node.op, tuple(types.items()), settings)


@lru_cache(maxsize=1024)
def _not_tables(pattern: Graph, wide: tuple[bool, ...]) -> frozenset[Node]:
    """The nodes of an expansion that depend on operands that differ from layer to layer."""
    values = {v for v, is_wide in zip(pattern.inputs, wide, strict=True) if is_wide}
    found = set()
    for node in pattern.nodes:
        if any(v in values for v in node.inputs):
            found.add(node)
            values.update(node.outputs)
    return frozenset(found)
