"""Decoding attends to the first keys of a cache: say so, instead of by a mask.

A cache of fixed size needs a mask for its unwritten end.  MLX has no fused kernel for array masks
on CUDA, where attention took 3 to 7 times as long with one as without, and none at all on CPUs,
where it multiplies with all of the cache by a reference BLAS.

Rewrites:
    1. `scaled_dot_product_attention` of one query a head with the mask `arange(length) <= last`, in
       any of its spellings, becomes `decode_attention`, which reads the keys 0 to `last` alone.
Leaves alone:
    1. several queries, other masks, sinks, head sizes the kernel does not know.
    2. on CPUs small caches: it runs from the host.
    3. other targets: Metal takes masks at little cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.ops import setting
from qgraph.kernels.attention.decode_attention import refusal
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor, apply

from .shared.views import without_views

_NAME = "choose-attention"


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
        return rewrite_each(graph, lambda node: _visit(node, target), self.name)


def _visit(node: Node, target: Target) -> Sequence[Value] | None:
    if node.op != "fast.scaled_dot_product_attention" or node.stream is not None:
        return None
    mask = node.args.get("mask")
    if not isinstance(mask, Value) or node.value("sinks") is not None:
        return None
    q, k, v = (node.operand(name) for name in ("q", "k", "v"))
    last = _last_seen(mask, k.shape[2])
    why = (
        "the mask is not `arange(length) <= last`"
        if last is None
        else refusal(q, k, v, target.backend)
    )
    types = q.type, k.type
    if last is None or why is not None:
        record(Entry.of(node, _NAME, "refused", f"the mask stays: {why}", types=types))
        return None
    reason = "keys up to a position, without a mask"
    record(Entry.of(node, _NAME, "chosen", reason, types=types))
    args = tuple(Tensor(value) for value in (q, k, v, last))
    cores = {"cores": target.cores} if target.is_cpu else {}
    y = apply("decode_attention", args, {"scale": setting(node, "scale"), **cores}).value
    return [y.node.replace(kernel="host-attention").output if cores else y]


def _last_seen(mask: Value, length: int) -> Value | None:
    """The value `last` if a mask over `length` keys is `arange(length) <= last`."""
    # No axes, or one number for each batch or head, as many as there are keys.
    if mask.shape[-1:] != (length,):
        return None
    node = without_views(mask).node
    if node.op not in ("less_equal", "greater_equal") or node.output.type.size != length:
        return None
    keys, last = node.inputs if node.op == "less_equal" else reversed(node.inputs)
    if not _counts_up(keys, length) or last.type.size != 1:
        return None
    return last if mx.issubdtype(last.dtype, mx.integer) else None


def _counts_up(value: Value, length: int) -> bool:
    """Is it 0, 1, … length - 1 along its last axis?"""
    node = without_views(value).node
    if value.type.size != length or value.shape[-1] != length:
        return False
    if node.op == "constant":
        data = node.args["data"]
        return not data.is_released and np.array_equal(
            np.asarray(data.array.reshape(-1)), np.arange(length)
        )
    dtype = node.output.dtype
    if node.op != "arange" or not mx.issubdtype(dtype, mx.integer):
        return False
    if length - 1 > mx.iinfo(dtype).max:  # it wraps around
        return False
    start, stop, step = (node.args.get(name) for name in ("start", "stop", "step"))
    first, end = (0, start) if stop is None else (start or 0, stop)
    return (first, end, step or 1) == (0, length, 1)
