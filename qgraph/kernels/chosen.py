"""The ops that chosen kernels become.

`pack_weight` runs once, in the pack or the prepare step, `packed_matmul` at every call, and
`packed_rows` where rows of a weight are read that nothing else keeps;
`decode_attention` is attention to the keys of a cache, `cached_attention` all that a decoding step
does with one, `tail_attention` the same with a tail beside it, that `merge_tail` takes in.  Kernels
are in `qgraph/kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from .attention.cached_attention import Heads, Rope
from .attention.cached_attention import cached_attention as attend_and_store
from .attention.decode_attention import attention_on_host
from .attention.decode_attention import decode_attention as attend
from .attention.tail_attention import merge_tail
from .attention.tail_attention import tail_attention as attend_with_tail
from .base import Problem, carry_out
from .matmul.gather import Gather
from .names import kernel as named

__all__ = [
    "cached_attention", "decode_attention", "merge_tail", "pack_weight", "packed_gather",
    "packed_matmul", "packed_rows", "runs_on_host", "streams_in_use", "tail_attention",
]  # fmt: skip


class _DefaultStream:
    def resolve(self, stream: Any) -> Any:
        return None


streams_in_use: ContextVar[Any] = ContextVar("streams_in_use", default=None)
"""The streams of the program that runs; types are inferred without."""


def pack_weight(parts: Sequence[mx.array], problem: Problem, kernel: str) -> list[mx.array]:
    """What kernel `kernel` reads at each call, of (w_q, scales) or (w_q, scales, biases)."""
    return list(named(kernel).pack(parts, problem))


def packed_rows(
    packed: Sequence[mx.array], indices: mx.array, problem: Problem, kernel: str
) -> list[mx.array]:
    """Rows of a packed weight, its scales and its biases, as they were before `pack_weight`."""
    return list(named(kernel).take_rows(packed, indices, problem))


def packed_matmul(
    x: mx.array, packed: Sequence[mx.array], problem: Problem, kernel: str
) -> mx.array:
    """The product of x (..., K) with a packed weight, (..., N), by `kernel`."""
    chosen = named(kernel)
    streams = streams_in_use.get()
    if chosen.host and streams is None:  # only its type is asked for
        return mx.zeros((*x.shape[:-1], problem.n), problem.out_dtype)
    return carry_out(chosen, x, packed, problem, streams or _DefaultStream())


def packed_gather(
    x: mx.array,
    packed: Sequence[mx.array],
    problem: Problem,
    kernel: str,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
) -> mx.array:
    """What `gather_qmm` gives for x (..., M, K) and matrices picked by index, by `kernel`."""
    streams = streams_in_use.get()
    chosen = named(kernel)
    if chosen.host and streams is None:
        chosen = Gather()
    assert isinstance(chosen, Gather)
    indices = (lhs_indices, rhs_indices)
    return chosen.run(x, packed, problem, streams or _DefaultStream(), *indices)


def decode_attention(
    q: mx.array, k: mx.array, v: mx.array, last: mx.array, scale: float, cores: int = 0,
    first: mx.array | None = None, window: int = 0, mask: mx.array | None = None,
    sinks: mx.array | None = None,
) -> mx.array:  # fmt: skip
    """Attention to the keys of a cache up to `last`; with `cores`, from the host."""
    more: dict[str, Any] = {"first": first, "window": window, "mask": mask, "sinks": sinks}
    if not cores:
        return attend(q, k, v, last, scale, **more)
    if streams_in_use.get() is None:  # only its type is asked for
        return mx.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    return attention_on_host(q, k, v, last, scale, cores, **more)


def cached_attention(
    *arrays: Any,
    heads: Sequence[tuple[int, int, int]],
    rope: tuple[int, bool, float | None, float],
    scale: float,
    window: int = 0,
) -> tuple[mx.array, mx.array, mx.array]:
    """One token's attention, and the caches after; `heads` and `rope` are `Heads` and a `Rope`."""
    q, k, v = (Heads(*at) for at in heads)
    return attend_and_store(*arrays, heads=(q, k, v), rope=Rope(*rope), scale=scale, window=window)


def tail_attention(
    *arrays: Any,
    heads: Sequence[tuple[int, int, int]],
    rope: tuple[int, bool, float | None, float],
    scale: float,
    window: int = 0,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The same, and the tail after."""
    q, k, v = (Heads(*at) for at in heads)
    return attend_with_tail(*arrays, heads=(q, k, v), rope=Rope(*rope), scale=scale, window=window)


def runs_on_host(op: str, args: Any) -> bool:
    """Must a node run from Python, between compiled stretches?"""
    if op == "decode_attention":
        return bool(args.get("cores"))
    return op in ("packed_matmul", "packed_gather") and named(args["kernel"]).host
