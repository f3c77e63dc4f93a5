"""Several nodes that are one step: rows of a packed weight, and products with what follows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ....ir.graph import Graph, Node, Value
from ....ir.ops import setting
from ....kernels.cpu.region import multiplies_bytes
from ....quantization.modes import MODES
from .activations import activation

ABSORBED: Final = "absorbed"
"""A node that is part of another's step."""


@dataclass
class TakenRows:
    """`dequantize` of rows `take`n of each part of a packed weight."""

    node: Node
    rows: list[Node]


@dataclass
class Rounded:
    """`dequantize(quantize(x))` that only products read, which round for themselves."""

    node: Node
    quantize: Node


@dataclass
class Followed:
    """A product and what is done to its sums before they are written.

    Attributes:
        node: the product.
        last: the node whose result is written.
        steps: all nodes but the product.
        gate: another product of the same rows, which the activated sums are multiplied by.
    """

    node: Node
    last: Node
    steps: list[Node] = field(default_factory=list)
    bias: Value | None = None
    activation: str = ""
    gate: Node | None = None
    times: Value | None = None
    add: Value | None = None


Pattern = TakenRows | Rounded | Followed

_PRODUCTS = ("quantized_matmul", "matmul", "addmm")


def find(body: Graph, uses: Mapping[Value, int]) -> dict[Node, Pattern | str]:
    """The patterns of a body by the node at which they are carried out; `ABSORBED` for others."""
    found: dict[Node, Pattern | str] = {}
    for node in body.nodes:
        if node.op == "dequantize" and (rows := _taken_rows(node, uses)):
            found[node] = TakenRows(node, rows)
            found.update(dict.fromkeys(rows, ABSORBED))
        elif node.op == "dequantize" and (made := _rounding(node, body, uses)):
            found[node] = Rounded(node, made)
            found[made] = ABSORBED
        elif node.op in _PRODUCTS and node not in found:
            product = _followed(node, body, uses, found)
            if product is not None:
                parts = [product.node, *product.steps, *filter(None, [product.gate])]
                found.update(dict.fromkeys(parts, ABSORBED))
                found[product.last] = product
    return found


def is_plain_dequantize(node: Node) -> bool:
    """Does it give the dtype of its scales, without a scale for all of it?"""
    dtype = node.args.get("dtype")
    affine = setting(node, "mode") == "affine"
    same = not affine or dtype is None or dtype == node.operand("scales").dtype
    return bool(same) and node.args.get("global_scale") is None


def _taken_rows(node: Node, uses: Mapping[Value, int]) -> list[Node] | None:
    parts = [node.value(name) for name in ("w", "scales", "biases")]
    rows = [part.node for part in parts if part is not None]
    if not is_plain_dequantize(node):
        return None
    alike = all(
        row.op == "take"
        and uses.get(row.output) == 1
        and row.operand("a").ndim == 2
        and setting(row, "axis") == 0
        and row.args["indices"] is rows[0].args["indices"]
        for row in rows
    )
    return rows if alike else None


def _rounding(node: Node, body: Graph, uses: Mapping[Value, int]) -> Node | None:
    """The `quantize` of 8 bits in groups of 32 behind a `dequantize`, if all that reads it is
    products of packed weights that know such rows."""
    made = node.operand("w").node
    settings = ("affine", 8, 32)
    if made.op != "quantize" or any(packing(each) != settings for each in (node, made)):
        return None
    parts, readers = made.outputs, body.users.get(node.output, ())
    alone = node.inputs == parts and all(uses.get(part) == 1 for part in parts)
    known = 0 < uses.get(node.output, 0) == len(readers) and all(
        reader.op == "quantized_matmul"
        and reader.operand("x") is node.output
        and reader.operand("w").ndim == 2
        and setting(reader, "transpose")
        and packing(reader)[:2] in (("affine", 4), ("affine", 8))
        for reader in readers
    )
    return made if alone and known and multiplies_bytes() else None


def packing(node: Node) -> tuple[str, int, int]:
    """Mode, bits and group size of a node's packed weight, the mode's own where none are given."""
    mode = MODES[setting(node, "mode")]
    bits, group = setting(node, "bits"), setting(node, "group_size")
    return mode.name, bits or mode.bits[0], group or mode.group_sizes[0]


def _is_plain(node: Node) -> bool:
    """Is it a product with one matrix?"""
    weight = node.operand("w" if node.op == "quantized_matmul" else "b")
    return weight.ndim == 2 and node.output.ndim >= 2


def _followed(
    node: Node, body: Graph, uses: Mapping[Value, int], found: Mapping[Node, Any]
) -> Followed | None:
    if not _is_plain(node):
        return None
    if node.op == "addmm" and not _adds_a_row(node):
        return None
    product = Followed(node, node)
    for grow in (_biased, _activated, _gated, _multiplied, _added):
        _reshaped(product, body, uses)
        grow(product, body, uses, found)
    while product.last.op == "reshape":  # nothing came after
        product.steps.pop()
        product.last = product.steps[-1] if product.steps else node
    return product if product.steps else None


def _adds_a_row(node: Node) -> bool:
    """Is what an `addmm` adds the same for all rows?"""
    c, n = node.operand("c"), node.output.shape[-1]
    return setting(node, "beta") == 1 and c.type.size == n and c.shape[-1:] == (n,)


def _reshaped(product: Followed, body: Graph, uses: Mapping[Value, int]) -> None:
    """Go on past reshapes that keep the columns."""
    while True:
        result = product.last.output
        reader = _only_reader(result, body, uses)
        if reader is None or reader.op != "reshape" or not reader.output.ndim:
            return
        if reader.output.shape[-1] != result.shape[-1]:
            return
        _take(product, reader)


def _only_reader(value: Value, body: Graph, uses: Mapping[Value, int]) -> Node | None:
    readers = body.users.get(value, ())
    return readers[0] if len(readers) == 1 and uses.get(value) == 1 else None


def _partner(
    product: Followed, body: Graph, uses: Mapping[Value, int], found: Mapping[Node, Any], op: str
) -> Value | None:
    """The other operand of the one node that reads the result so far, if that is an `op`.

    Of two products that are added, the first takes the sum with it: it is no part of the second.
    """
    result = product.last.output
    reader = _only_reader(result, body, uses)
    if reader is None or reader in found:
        return None
    if reader.op != op or reader.output.type != result.type:
        return None
    a, b = reader.inputs
    return b if a is result else a


def _take(product: Followed, *nodes: Node) -> None:
    product.steps += nodes
    product.last = nodes[-1]


def _biased(
    product: Followed, body: Graph, uses: Mapping[Value, int], found: Mapping[Node, Any]
) -> None:
    other = None if product.node.op == "addmm" else _partner(product, body, uses, found, "add")
    result = product.last.output
    if other is not None and other.shape == result.shape[-1:] and other.dtype == result.dtype:
        product.bias = other
        _take(product, body.users[result][0])


def _activated(product: Followed, body: Graph, uses: Mapping[Value, int], _: Any) -> None:
    found = activation(product.last.output, body, uses)
    if found is not None:
        product.activation, nodes = found
        _take(product, *nodes)


def _gated(
    product: Followed, body: Graph, uses: Mapping[Value, int], found: Mapping[Node, Any]
) -> None:
    other = _partner(product, body, uses, found, "multiply")
    if other is None or other.node in found or other.node.op != product.node.op:
        return
    if product.node.op == "addmm":  # the gate's bias has no place
        return
    gate = other.node
    if uses.get(other) == 1 and _is_plain(gate) and _alike(gate, product.node):
        product.gate = gate
        _take(product, body.users[product.last.output][0])


def _alike(a: Node, b: Node) -> bool:
    """Do two products read the same rows, by weights that are stored alike?"""
    x, w = ("x", "w") if a.op == "quantized_matmul" else ("a", "b")
    if a.args[x] is not b.args[x] or a.attrs != b.attrs:
        return False
    names = (w, "scales", "biases") if a.op == "quantized_matmul" else (w,)
    pairs = [(a.value(name), b.value(name)) for name in names]
    return all(p is q or (p is not None and q is not None and p.type == q.type) for p, q in pairs)


def _multiplied(
    product: Followed, body: Graph, uses: Mapping[Value, int], found: Mapping[Node, Any]
) -> None:
    other = _partner(product, body, uses, found, "multiply")
    if product.gate is None and other is not None and other.type == product.last.output.type:
        product.times = other
        _take(product, body.users[product.last.output][0])


def _added(
    product: Followed, body: Graph, uses: Mapping[Value, int], found: Mapping[Node, Any]
) -> None:
    other = _partner(product, body, uses, found, "add")
    if other is not None and other.type == product.last.output.type:
        product.add = other
        _take(product, body.users[product.last.output][0])
