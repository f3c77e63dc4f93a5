"""Recognize the primitives into which MLX expands attention on CPUs as the one op again.

Rewrites, exactly on CPUs, within 2e-2 on GPUs, where MLX has kernels, to
`fast.scaled_dot_product_attention`:
    1. attention without a mask, with a boolean or an additive one, or with `mask="causal"`.
    2. grouped queries, in which several heads share a key and a value.
    3. attention sinks.
Leaves alone:
    1. anything that differs from MLX's expansion in one op, setting or constant: scores that are
       capped, biased or scaled after the product, softmax in half precision, dropout.
    2. weights that something else reads as well.
    3. nodes whose device or stream the user chose.
Where a mask hides every key from a query, the expansion gives the mean of the values, and so does
the op on CPUs; on GPUs it gives what MLX's kernel makes of such a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.ops import setting

from .shared.raising import Expansion, Raising, layers, number, peel

_OP = "fast.scaled_dot_product_attention"


@dataclass(frozen=True)
class RaiseAttention(Raising):
    """See the module."""

    name: str = "raise-attention"

    def find(self, graph: Graph) -> Iterator[Expansion]:
        for node in graph.nodes:
            if node.op == "softmax" and setting(node, "precise"):
                found = next((e for e in _guesses(graph, node) if e.holds), None)
                if found is not None:
                    yield found


def _guesses(graph: Graph, softmax: Node) -> Iterator[Expansion]:
    """What a softmax may be the middle of."""
    scores, operands = softmax.inputs[0], {}
    if scores.node.op == "concatenate" and len(scores.node.inputs) == 2:
        sinks, scores = scores.node.inputs
        operands["sinks"] = peel(sinks, "broadcast_to", "reshape", "expand_dims")
    product, masks = _masked(scores)
    end = _end(graph, softmax.output, product)
    if product.op != "matmul" or end is None:
        return
    grouped = product.output.ndim == 5
    values, root = end
    scaled = (peel(product.inputs[0], "reshape") if grouped else product.inputs[0]).node
    if scaled.op != "multiply":
        return
    operands |= {
        "q": scaled.inputs[1],
        "k": _one_for_all(product.inputs[1], grouped, "transpose"),
        "v": _one_for_all(values, grouped),
    }
    for scale in _scales(scaled):
        for mask in masks:
            if isinstance(mask, Value):
                yield Expansion(root, _OP, {**operands, "mask": mask}, {"scale": scale})
            else:
                yield Expansion(root, _OP, operands, {"scale": scale, **mask})


def _masked(scores: Value) -> tuple[Node, list[Any]]:
    """The product under a mask, and what the mask may be: a tensor, or settings without one."""
    node = scores.node
    if node.op == "where":
        return node.inputs[1].node, [{"mask": "causal"}, *_masks(node.inputs[0])]
    if node.op == "add":
        return node.inputs[0].node, _masks(node.inputs[1])
    return node, [{}]


def _masks(value: Value) -> list[Any]:
    """What a mask may have been before MLX made it fit the scores."""
    found = layers(value, "broadcast_to", "reshape", "expand_dims", "astype")
    return [mask for mask in found if mask.ndim <= 4]


def _one_for_all(value: Value, grouped: bool, *ops: str) -> Value:
    """Keys or values before they were laid out for the product."""
    if not grouped:
        return peel(value, *ops)
    return peel(value, "broadcast_to", *ops, "expand_dims")


def _end(graph: Graph, weights: Value, product: Node) -> tuple[Value, Value] | None:
    """The values that the weights are multiplied by, and the result of the attention."""
    while len(users := graph.users.get(weights, ())) == 1 and weights not in graph.outputs:
        (user,) = users
        if user.op == "matmul":
            if product.output.ndim < 5:
                return user.inputs[1], user.output
            joined = [n for n in graph.users.get(user.output, ()) if n.op == "reshape"]
            return (user.inputs[1], joined[0].output) if len(joined) == 1 else None
        if user.op != "getitem":  # sinks have had their weight
            return None
        weights = user.output
    return None


def _scales(product: Node) -> Iterator[float]:
    """What the factor of the queries may have been: in half precision it is rounded."""
    scale, width = number(product.inputs[0]), product.output.shape[-1]
    if scale is None or not width:
        return
    usual = float(np.float32(width**-0.5))
    if mx.array(usual, product.output.dtype).item() == mx.array(scale, product.output.dtype).item():
        yield usual
    yield scale
