"""Decoding attends to the first keys of a cache: say so, instead of by a mask.

A cache of fixed size needs a mask for its unwritten end.  MLX has no fused kernel for array masks
on CUDA, where attention took 3 to 7 times as long with one as without, and none at all on CPUs,
where it multiplies with all of the cache by a reference BLAS.

Rewrites:
    1. `scaled_dot_product_attention` of one query a head with the mask `arange(length) <= last`, in
       any of its spellings, becomes `decode_attention`, which reads the keys 0 to `last` alone.
    2. a mask that also hides the keys before a first one, of each row of a batch, or all but those
       of a window, becomes a first position and a window.
    3. on CUDA several queries too, of which each sees one key more than the one before; attention
       sinks; and whatever else a mask says, which it goes on to say to the kernel.
    4. on CUDA a mask that is added, of zeros and -infinity, is the truths that it was made of: MLX
       makes it of them before its kernel, as large as all scores.  A query that sees no key gets
       the mean of the values then, as under a mask of truths.
Leaves alone:
    1. masks that are no arrays, head sizes and numbers of queries that the kernel does not know.
    2. on CPUs small caches, as it runs from the host, and what 3 has.
    3. other targets: Metal takes masks at little cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.ops import setting
from qgraph.kernels.attention.decode_attention import refusal
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor, apply, as_tensor

from .shared.key_limits import KeyLimits, key_limits
from .shared.raising import layers, number, peel

_NAME = "choose-attention"
_OP = "fast.scaled_dot_product_attention"


@dataclass(frozen=True)
class ChooseAttention:
    """See the module.  `everywhere` rewrites for other targets too, to test without a GPU."""

    target: Target | None = None
    everywhere: bool = False
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        target = as_target(self.target)
        if self.everywhere:
            target = replace(target, backend="cuda")
        if target.backend not in ("cuda", "cpu"):
            return graph
        return rewrite_each(graph, lambda node: _visit(node, target), self.name, (_OP,))


def _visit(node: Node, target: Target) -> Sequence[Value] | None:
    if node.stream is not None:
        return None
    mask, sinks = node.args.get("mask"), node.value("sinks")
    if not isinstance(mask, Value):
        return None
    if target.backend == "cuda":
        mask = _truths(mask)
    q, k, v = (node.operand(name) for name in ("q", "k", "v"))
    (batch, _, queries, _), length = q.shape, k.shape[2]
    limits = KeyLimits(rest=(mask,))
    if mask.dtype == mx.bool_:
        limits = key_limits(mask, batch, queries, length)
    types = q.type, k.type
    why = refusal(q, k, v, target.backend)
    if target.is_cpu and (limits.last is None or limits.rest):
        why = "the mask is not `arange(length) <= last`"
    elif target.is_cpu and sinks is not None:
        why = "from the host it takes no sinks"
    if why is not None:
        record(Entry.of(node, _NAME, "refused", f"the mask stays: {why}", types=types))
        return None
    reason = "keys up to a position, without a mask" if not limits.rest else "keys as a mask says"
    record(Entry.of(node, _NAME, "chosen", reason, types=types))
    settings: dict[str, Any] = {"scale": setting(node, "scale")}
    if target.is_cpu:
        settings["cores"] = target.cores
    if limits.first is not None:
        settings["first"] = Tensor(limits.first)
    if limits.window:
        settings["window"] = limits.window
    if limits.rest:
        rest = mask if limits.rest == (mask,) else _all_of(limits.rest)
        settings["mask"] = Tensor(rest)
    if sinks is not None:
        settings["sinks"] = Tensor(sinks)
    # With no limit the first of several queries sees all keys as well.
    last = limits.last or as_tensor(mx.array(length + queries - 2, mx.int32)).value
    args = tuple(Tensor(value) for value in (q, k, v, last))
    y = apply("decode_attention", args, settings).value
    return [y.node.replace(kernel="host-attention").output if target.is_cpu else y]


def _truths(mask: Value) -> Value:
    """What `where(truths, 0, -inf)` was made of; another mask as it is."""
    node = peel(mask, "broadcast_to").node
    if node.op != "where" or node.stream is not None:
        return mask
    truths, shown, hidden = node.inputs
    if truths.dtype != mx.bool_ or (_filling(shown), _filling(hidden)) != (0, -math.inf):
        return mask
    return peel(truths, "broadcast_to")


def _filling(value: Value) -> float | None:
    """The number that a value consists of, if that is known."""
    value = layers(value, "broadcast_to", "astype")[0]
    found = number(value)
    return None if found is None else float(found)


def _all_of(truths: Sequence[Value]) -> Value:
    found = Tensor(truths[0])
    for truth in truths[1:]:
        found = apply("logical_and", (found, Tensor(truth)))
    return found.value
