"""What a decoding step does with a key-value cache becomes one kernel.

Around the attention of one token stand two `rope`s and two `slice_update`s, with views between.  On
CUDA a step of Llama-8B took some 500 operations, of which 11 of each layer's 17 were these.

Rewrites:
    1. `decode_attention` of caches that are `slice_update`s of one token at one position becomes
       `cached_attention`, which gives the result and both caches; a window and sinks go with it.
    2. `rope`s of the query and of the key by one number, read by nothing else, go into it: by that
       position, or by another, as in a ring, where a token takes the place of an older one.
    3. so do views and splits before them: it reads heads from the product of Q, K and V.
Leaves alone:
    1. caches of which something reads the updates besides this attention and the caller or next
       turn (on a mesh, what joins a rank's part for them), and updates of more than a token, of
       some heads, in another dtype or at two positions; attention with a first key or a mask.
    2. nodes with a stream of their own.
    3. other targets than CUDA, for which the kernel is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.ops import setting
from qgraph.kernels.attention.cached_attention import Heads, Rope
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import Visit, rewrite
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor, apply
from qgraph.types import TensorType

from .shared.views import without_views

_NAME = "fuse-cache"
_ATTENTION = "decode_attention"


@dataclass(frozen=True)
class FuseCache:
    """See the module.  `everywhere` rewrites for other targets too, to test without a GPU."""

    target: Target | None = None
    everywhere: bool = False
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        if not self.everywhere and as_target(self.target).backend != "cuda":
            return graph
        return rewrite(graph, _visitor, self.name)


def _visitor(graph: Graph) -> Visit | None:
    if _ATTENTION not in graph.ops:
        return None
    readers: dict[Value, list[Node | None]] = defaultdict(list)
    for node in graph.nodes:
        for value in node.inputs:
            readers[value].append(node)
    for value in graph.outputs:
        readers[value].append(None)

    def visit(new: Node, old: Node) -> Mapping[Value, Value] | None:
        if old.op != _ATTENTION or old.stream is not None or old.args.get("cores"):
            return None
        why = _refusal(old, readers)
        types = old.operand("q").type, old.operand("k").type
        if why is not None:
            record(Entry.of(old, _NAME, "refused", f"the cache is apart: {why}", types=types))
            return None
        read_once = all(len(readers[v]) == 1 for v in (old.operand("q"), _update(old, "k")))
        ropes = _ropes(new) if read_once else None
        reason = "stores the token and attends" + (" with its rotation" if ropes else "")
        record(Entry.of(old, _NAME, "fused", reason, types=types))
        return _fused(new, ropes)

    return visit


def _update(attention: Node, name: str) -> Value:
    """What is stored in the keys or values of an attention."""
    return attention.operand(name).node.operand("update")


def _refusal(attention: Node, readers: Mapping[Value, Sequence[Node | None]]) -> str | None:
    if more := [name for name in ("first", "mask") if setting(attention, name)]:
        return f"the attention has {' and '.join(more)}"
    if attention.operand("q").shape[2] != 1:
        return f"there are {attention.operand('q').shape[2]} queries a head"
    for name, what in (("k", "keys"), ("v", "values")):
        cache = attention.operand(name)
        node = cache.node
        if node.op != "slice_update" or node.stream is not None:
            return f"the {what} are no slice_update"
        if [axis % 4 for axis in node.args["axes"]] != [2]:
            return f"the {what} are updated along another axis than that of positions"
        batch, heads, _, dim = cache.shape
        if _update(attention, name).type != TensorType((batch, heads, 1, dim), cache.dtype):
            return f"the {what} are not updated by one token of all heads, of their dtype"
        if any(not _gives_on(r) for r in readers[cache] if r is not attention):
            return f"something else reads the {what} after their update"
    starts = [attention.operand(name).node.operand("start_indices") for name in "kv"]
    if without_views(starts[0]) is not without_views(starts[1]):
        return "keys and values are stored at different positions"
    return None


def _gives_on(reader: Node | None) -> bool:
    """Does it give a cache to the caller or the next turn, on a mesh a rank's part of it?"""
    return reader is None or reader.op == "distributed.join"


def _ropes(attention: Node) -> tuple[Node, Node] | None:
    """The rotations of query and key, if they are equal and by one number of the run."""
    query, key = attention.operand("q").node, _update(attention, "k").node
    if query.op != "fast.rope" or key.op != "fast.rope" or query.stream or key.stream:
        return None
    fields = ("dims", "traditional", "base", "scale", "offset", "freqs")
    if any(setting(query, name) != setting(key, name) for name in fields):
        return None
    offset = setting(query, "offset")
    return (query, key) if isinstance(offset, Value) and offset.type.size == 1 else None


def _fused(attention: Node, ropes: tuple[Node, Node] | None) -> Mapping[Value, Value]:
    """The outputs of an attention and of the updates before it, by one kernel, rotations too."""
    keys, values = (attention.operand(name).node for name in "kv")
    taken = [attention.operand("q"), _update(attention, "k"), _update(attention, "v")]
    rope, freqs, offset = Rope(), None, None
    if ropes is not None:
        taken[:2] = [node.operand("a") for node in ropes]
        fields = (setting(ropes[0], name) for name in ("dims", "traditional", "base", "scale"))
        rope, freqs = Rope(*fields), ropes[0].value("freqs")
        turned = ropes[0].operand("offset")
        if without_views(turned) is not without_views(keys.operand("start_indices")):
            offset = turned
    found = [_heads(value) for value in taken]
    operands = [value for value, _ in found] + [
        keys.operand("a"), values.operand("a"), keys.operand("start_indices"),
        attention.operand("last"),
    ]  # fmt: skip
    more = (freqs, offset, attention.value("sinks"))
    window = setting(attention, "window")
    results = apply(
        "cached_attention",
        (*map(Tensor, operands), *(None if v is None else Tensor(v) for v in more)),
        {
            "heads": tuple(tuple(at) for _, at in found),
            "rope": tuple(rope),
            "scale": setting(attention, "scale"),
            **({"window": window} if window else {}),
        },
    )
    replaced = (attention.output, keys.output, values.output)
    return {old: new.value for old, new in zip(replaced, results, strict=True)}


def _heads(value: Value) -> tuple[Value, Heads]:
    """The array that holds heads (batch, count, 1, dim), and where."""
    batch, count, _, dim = value.shape
    source = without_views(value)
    node = source.node
    if node.op == "split" and node.stream is None:
        whole = node.operand("a")
        axis = setting(node, "axis") % whole.ndim
        if axis == whole.ndim - 1 and prod(whole.shape[:-1]) == batch:
            before = node.outputs[: node.outputs.index(source)]
            start = sum(part.shape[-1] for part in before)
            return whole, Heads(count, start, whole.shape[-1])
    return source, Heads(count, 0, count * dim)
