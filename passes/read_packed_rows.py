"""Read rows of a weight from the layout that a kernel packed it in, where nothing else needs it.

An embedding whose weight is the head's too is read row by row and multiplied as a whole.  Where
`choose-kernel` packed it in a layout of its own, the weight as it was would be kept for the rows.

Rewrites:
    1. `take(part, ids, axis=0)` of the packed weight, its scales or its biases: `packed_rows`, if
       the kernel gives rows, and if all who read the parts pack them so or take rows.
Leaves alone:
    1. weights that another op reads as they are: they are kept anyway.
    2. rows taken along other axes, or by a stream of the user's choice.
    3. in loops and branches, a weight that is packed outside: it is read as it was there.

Runs after `choose-kernel`; `eliminate-common-subexpressions` makes one of what it packs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.ir.graph import Graph, Node, Value
from qgraph.kernels import kernel
from qgraph.rewrite.rewriter import Visit, rewrite
from qgraph.tracing.tensor import Tensor, apply

_NAME = "read-packed-rows"


@dataclass(frozen=True)
class ReadPackedRows:
    """See the module."""

    name: str = _NAME
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, _visitor, self.name)


def _visitor(graph: Graph) -> Visit | None:
    packed = {
        part: node
        for node in graph.nodes
        if node.op == "pack_weight" and _gives_rows(graph, node)
        for part in node.args["parts"]
    }
    if not packed:
        return None

    def visit(node: Node, old: Node) -> Sequence[Value] | None:
        source = packed.get(old.operand("a")) if _takes_rows(old) else None
        if source is None:
            return None
        parts = [Tensor(part) for part in source.args["parts"]]
        static = {"problem": source.args["problem"], "kernel": source.args["kernel"]}
        tiles = apply("pack_weight", (parts,), static)
        rows = apply("packed_rows", (tiles, Tensor(node.operand("indices"))), static)
        return [rows[source.args["parts"].index(old.operand("a"))].value]

    return visit


def _gives_rows(graph: Graph, node: Node) -> bool:
    """Do all who read the parts of a packed weight pack them so, or take rows?"""
    parts = node.args["parts"]
    return (
        kernel(node.args["kernel"]).gives_rows
        and not node.args["problem"].experts
        and all(_stays(part) and part not in graph.outputs for part in parts)
        and all(
            _reads_rows(reader, part) or _packs(reader, node.args["kernel"])
            for part in parts
            for reader in graph.users.get(part, ())
        )
    )


def _packs(node: Node, name: str) -> bool:
    return node.op == "pack_weight" and node.args["kernel"] == name


def _reads_rows(node: Node, part: Value) -> bool:
    return _takes_rows(node) and node.operand("a") is part


def _stays(value: Value) -> bool:
    """Is it one that this pass surely replaces nothing of: given, or quantized of what is given?"""
    given = ("constant", "input")
    return value.node.op in given or (
        value.node.op == "quantize" and all(v.node.op in given for v in value.node.inputs)
    )


def _takes_rows(node: Node) -> bool:
    return node.op == "take" and node.args.get("axis") == 0 and node.stream is None
