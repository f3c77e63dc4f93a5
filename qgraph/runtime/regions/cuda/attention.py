"""A region's attention to a cache and its tail, for one token of each batch: a phase of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from typing import Any

import mlx.core as mx

from ....ir.graph import Node
from ....kernels.attention.cached_attention import Heads, Rope
from ....kernels.attention.form import HEAD_DIMS, Cut
from ....kernels.base import HALF
from ..unknown import Unknown
from .expressions import TYPES, literal

OP = "tail_attention"
LONGEST = 4096
"""Positions of a cache up to which an attention is part of a region; 0 for none.

A region's 16 warps have few registers each: with 16,064 positions a layer of Llama-8B's shape took
109 µs together, and 101 in launches of their own (one H100).
"""
WARPS = 16
"""Of a block of a region."""
THREADS = 32 * WARPS
ALONE = 512
"""Positions of a cache up to which one block reads all keys of a head: joining takes longer."""
JOINS = 32
"""The first of the counters by which those that have parts of one result know the last of them."""
MOST_JOINS = 480
ARRAYS = ("q", "k", "v", "keys", "values", "tail_keys", "tail_values", "tail_positions", "position",
          "last", "freqs")  # fmt: skip
OUTPUTS = ("y", "new_keys", "new_values", "new_positions")


@dataclass(frozen=True)
class Attention:
    """A phase.

    Attributes:
        names: in the source, of its arrays and outputs; `parts` are there if several blocks read
            the keys of one head.
        shape: of the caches, (batch, kv_heads, length, dim).
        tail: rows of the tail.
        settings: of the node: heads, rope, scale.
        lasts: how many numbers `last` holds.
    """

    names: dict[str, str]
    dtype: mx.Dtype
    shape: tuple[int, ...]
    tail: int
    settings: dict[str, Any]
    lasts: int
    cut: Cut

    @property
    def shared_memory(self) -> int:
        """Bytes: at least as many as `SharedOfPhase` has in the source."""
        rows, dim = 8 * self.cut.tiles, self.shape[3]
        exchanged = 4 * WARPS * 16 * 32
        each = rows * (2 * dim + 12) + 12 * WARPS * rows + 4 * self.tail + 8 * dim
        return exchanged + each + 192

    def text(self) -> Iterator[str]:
        """The phase, where `memory_of_attention` is free."""
        _, kv_heads, length, dim = self.shape
        heads, rope, scale = (self.settings[name] for name in ("heads", "rope", "scale"))
        q, k, v = (Heads(*at) for at in heads)
        dims, traditional, base, rope_scale = Rope(*rope)
        n = self.names
        form = f"{TYPES[self.dtype]}, {dim}, {dim}, {self.cut.tiles}, {WARPS}, {self.tail}"
        given = ", ".join([
            f"{n['q']} + {q.start}", f"{q.step}, {dim}, {dim}", n["keys"], n["values"],
            f"{q.number}, {kv_heads}, 1, {length}, {self.cut.splits}", literal(scale), n["last"],
            f"nullptr, {int(self.lasts > 1)}, 0, 0, nullptr, 0, 0, 0, 0, nullptr",
            n.get("parts", "nullptr"), n["y"],
        ])  # fmt: skip
        turned = ", ".join([
            str(dims), str(bool(traditional)).lower(), literal(log2(base) if base else 0.0),
            literal(rope_scale), n.get("freqs", "nullptr"),
        ])  # fmt: skip
        token = ", ".join([
            f"{n['k']} + {k.start}, {n['v']} + {v.start}, {k.step}, {v.step}", n["position"],
            f"{{{turned}}}", *(n[f"tail_{name}"] for name in ("keys", "values", "positions")),
            *(n[f"new_{name}"] for name in ("keys", "values", "positions")),
        ])  # fmt: skip
        yield "{"
        yield f"using F = qgraph::Form<{form}>;"
        yield "using Memory = qgraph::SharedOfPhase<F>;"
        yield f"static_assert(sizeof(Memory) <= {self.shared_memory});"
        yield f"const qgraph::Call<F::S> call{{{given}}};"
        yield f"const qgraph::Token<F::S> token{{{token}}};"
        yield (
            f"qgraph::attention_phase<F, {q.number // kv_heads}, "
            f"{self.cut.tasks * self.cut.splits}, {self.cut.splits}>("
            f"call, token, grid.counters + {JOINS}, "
            "*reinterpret_cast<Memory*>(memory_of_attention));"
        )
        yield "}"


def check(node: Node) -> None:
    """Has an attention a place in a region?

    Raises:
        Unknown: it has none.
    """
    keys, q = node.operand("keys"), node.operand("q")
    batch, kv_heads, length, dim = keys.shape
    if node.stream is not None:
        raise Unknown("it has a stream of its own")
    if length > LONGEST:
        raise Unknown(f"a cache of {length} positions; beyond {LONGEST} it is faster alone")
    if keys.dtype not in HALF:
        raise Unknown(f"a cache of {keys.dtype}")
    if dim not in HEAD_DIMS:
        raise Unknown(f"heads of {dim}")
    for name in ("position", "last", "tail_positions"):
        if node.operand(name).dtype != mx.int32:
            raise Unknown(f"{name} of {node.operand(name).dtype}")
    if node.value("offset") is not None:
        raise Unknown("a rotation by another number than its position")
    if node.value("sinks") is not None or node.args.get("window"):
        raise Unknown("sinks or a window")
    freqs = node.value("freqs")
    if freqs is not None and freqs.dtype != mx.float32:
        raise Unknown(f"frequencies of {freqs.dtype}")
    cut = cut_of(node)
    if cut.tasks > MOST_JOINS:
        raise Unknown(f"{cut.tasks} heads in {batch} rows of {kv_heads}, up to {MOST_JOINS}")
    if q.dtype != keys.dtype:
        raise Unknown(f"a query of {q.dtype}")


def cut_of(node: Node) -> Cut:
    """How an attention is cut into tasks."""
    batch, kv_heads, length, dim = node.operand("keys").shape
    sharing = node.args["heads"][0][0] // kv_heads
    cut = Cut.of(batch, kv_heads, sharing, dim, length)
    return cut._replace(splits=1) if length <= ALONE else cut
