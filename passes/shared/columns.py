"""Products whose results are cut into columns, such as Q, K and V, as a product for each cut.

A split of the whole would tear the cuts apart: a rank would hold all of Q and nothing of V.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.ops import setting
from qgraph.rewrite.rewriter import Visit, rewrite
from qgraph.tracing.tensor import Tensor, apply

from .indexing import index_of
from .products import PARTS

Cut = tuple[int, int]


def cut_products(graph: Graph, fixed: Collection[Value], made_by: str) -> Graph:
    """The graph with a product for each cut; exact: a column is a sum of its own.

    Args:
        fixed: values that are the same at every call, as a product's weight must be.
    """

    def visitor(inner: Graph) -> Visit:
        def visit(node: Node, old: Node) -> Sequence[Value] | None:
            cuts = _cuts(old)
            if cuts is None or not _only_cut(inner, old.inputs[0]):
                return None
            if not _can_be_cut(inner, old.inputs[0], fixed):
                return None
            return [_columns(node.inputs[0], cut) for cut in cuts]

        return visit

    return rewrite(graph, visitor, made_by)


def _cuts(node: Node) -> list[Cut] | None:
    """Which columns the results of a `split` or a slice are of its operand."""
    if node.op not in ("split", "getitem") or len(node.inputs) != 1 or not node.inputs[0].ndim:
        return None
    x = node.inputs[0]
    if node.op == "split":
        if setting(node, "axis") % x.ndim != x.ndim - 1:
            return None
        ends = [0]
        for part in node.outputs:
            ends.append(ends[-1] + part.shape[-1])
        return list(pairwise(ends))
    *others, last = index_of(node)
    if any(p is not Ellipsis and p != slice(None) for p in others):
        return None
    if Ellipsis not in others and len(others) != x.ndim - 1:
        return None
    if not isinstance(last, slice) or last.step not in (None, 1):
        return None
    start, stop, _ = last.indices(x.shape[-1])
    return [(start, stop)] if stop - start < x.shape[-1] else None


def _only_cut(graph: Graph, value: Value) -> bool:
    readers = graph.users.get(value, ())
    return value not in graph.outputs and all(_cuts(reader) is not None for reader in readers)


def _can_be_cut(graph: Graph, value: Value, fixed: Collection[Value]) -> bool:
    """Is it a product with a weight, or one with a bias added, that nothing else reads?"""
    node = value.node
    if node.op == "add":
        pair = sorted(node.inputs, key=lambda v: v in fixed)
        if len(pair) < 2 or pair[1] not in fixed or pair[1].ndim != 1:
            return False
        alone = graph.users.get(pair[0], ()) == (node,) and pair[0] not in graph.outputs
        return alone and _can_be_cut(graph, pair[0], fixed)
    if _keeps_columns(node):
        source = node.inputs[0]
        alone = graph.users.get(source, ()) == (node,) and source not in graph.outputs
        return alone and _can_be_cut(graph, source, fixed)
    if node.op == "quantized_matmul":
        return bool(setting(node, "transpose")) and node.operand("w") in fixed
    if node.op == "addmm" and node.operand("c").shape != node.operand("b").shape[-1:]:
        return False
    return (
        node.op in ("matmul", "addmm")
        and node.operand("b") in fixed
        and (node.operand("b").ndim == 2)
    )


def _keeps_columns(node: Node) -> bool:
    """Does it lay out rows in another way?"""
    return node.op == "reshape" and node.inputs[0].shape[-1:] == node.output.shape[-1:]


def _columns(value: Value, cut: Cut) -> Value:
    """The columns of a product, by a product with those of the weight."""
    node, (start, stop) = value.node, cut
    some = slice(start, stop)
    if node.op == "add":
        added: Value = apply(
            "add", tuple(
                _last(v, some) if v.ndim == 1 else Tensor(_columns(v, cut)) for v in node.inputs
            ),
        ).value  # fmt: skip
        return added
    if _keeps_columns(node):
        narrow = Tensor(_columns(node.inputs[0], cut))
        laid: Value = apply("reshape", (narrow, (*value.shape[:-1], stop - start))).value
        return laid
    args = dict(node.args)
    if node.op == "quantized_matmul":
        for name in PARTS:
            if (part := node.value(name)) is not None:
                args[name] = apply("getitem", (Tensor(part), some)).value
    else:
        args["b"] = _last(node.operand("b"), some).value
        if node.op == "addmm":
            args["c"] = _last(node.operand("c"), some).value
    types = [type(value.type)((*value.shape[:-1], stop - start), value.dtype)]
    return node.replace(args=args, types=types).output


def _last(value: Value, some: slice) -> Tensor:
    found: Tensor = apply("getitem", (Tensor(value), (*(slice(None),) * (value.ndim - 1), some)))
    return found
