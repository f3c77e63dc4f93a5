"""Move factors on the channels of weights into the weights that read them, as AWQ does.

A `Quantize` that was fitted may say that a weight (a norm's, or a linear layer's rows) is to be
divided by a factor for each channel, and the weights that multiply what comes of it, multiplied:
columns with large inputs then lose less when they are rounded (Lin et al., "AWQ",
arXiv:2306.00978).  The result is the same function of the same ops; only constants differ.

Rewrites:
    1. the weight, what is added to its channels, and the weights that end them, where
       `shared/channels` proves that the function stays the same.
Leaves alone, with the reason in the ledger:
    1. weights for which it cannot be proven: the numbers that were fitted for scaled weights then
       do not count either, as they are for other weights than there are.
    2. names of no constant of this graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.ir.graph import Data, Graph, Node, Value
from qgraph.quantization.fitted import sampled_mark, samples
from qgraph.rewrite.ledger import Decision, Entry, record

from .shared.channels import Refused, follow

_NAME = "fold-scales"


@dataclass(frozen=True)
class FoldScales:
    """See the module.

    Attributes:
        factors: what to divide the channels of a weight by, float32, by its name.
    """

    factors: Mapping[str, mx.array] = field(default_factory=dict)
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        changed = _changed(graph, self.factors)
        if not changed:
            return graph
        replace: dict[Value, Value] = {}
        nodes: list[Node] = []
        for node in graph.nodes:
            new = node.with_inputs(replace)
            if node.op == "constant" and node.output in changed:
                data = _scaled(node.args["data"], changed[node.output])
                new = node.replace(args={**node.args, "data": data}, origin=node.origin.by(_NAME))
            if new is not node:
                replace.update(zip(node.outputs, new.outputs, strict=True))
            nodes.append(new)
        return graph.replace(nodes=nodes, outputs=[replace.get(v, v) for v in graph.outputs])


def _changed(graph: Graph, factors: Mapping[str, mx.array]) -> dict[Value, list[np.ndarray]]:
    """What each constant is multiplied by, arrays that broadcast with it."""
    constants = {node.args["name"]: node.output for node in graph.constants()}
    changed: dict[Value, list[np.ndarray]] = {}
    for name, factor in factors.items():
        weight = constants.get(name)
        if weight is None:
            record(Entry(_NAME, "refused", reason="no constant has this name", about=name))
            continue
        by = np.array(factor.astype(mx.float32))
        try:
            channels = follow(graph, weight)
            if channels.count != by.size:
                raise Refused(f"it has {channels.count} channels, and there are {by.size} factors")
        except Refused as refusal:
            where = f" ({refusal.node.origin})" if refusal.node is not None else ""
            _note(weight, "refused", f"its factors stay where they are: {refusal.reason}{where}")
            continue
        for value, ids in channels.divided.items():
            changed.setdefault(value, []).append((1 / by)[_small(ids)])
        for value, ids in channels.multiplied.items():
            changed.setdefault(value, []).append(by[ids])
        ends = ", ".join(str(v.node.args["name"]) for v in channels.multiplied)
        _note(weight, "rewritten", f"divided by factors that multiply {ends}")
    return changed


def _small(ids: np.ndarray) -> np.ndarray:
    """Ids with one element along axes on which they do not depend."""
    return ids[tuple(slice(0, 1) if not step else slice(None) for step in ids.strides)]


def _scaled(data: Data, factors: list[np.ndarray]) -> Data:
    """The array times its factors, computed when it is read; its mark is known without."""
    array = data.array

    def times(part: mx.array, *by: Any) -> mx.array:
        product = reduce(lambda x, f: x * mx.array(f), by, part.astype(mx.float32))
        return product.astype(array.dtype)

    scaled = Data(times(array, *factors))
    places = np.unravel_index(np.array(samples(array.size)), array.shape)
    picked = [np.broadcast_to(f, array.shape)[places] for f in factors]

    def mark() -> str:
        return sampled_mark(array.shape, times(array[tuple(map(mx.array, places))], *picked))

    scaled.mark = mark
    return scaled


def _note(value: Value, decision: Decision, reason: str) -> None:
    name, types = str(value.node.args["name"]), (value.type,)
    record(Entry(_NAME, decision, "", value.node.origin, reason, name=name, types=types))
