"""Quantized products that share their input become one, whose result is split.

One product of N1 + N2 columns costs a GPU less than two: an operation less to launch, and more
work at once.

Rewrites (each exact: a column of the result is one row of the weight):
    1. `quantized_matmul`s of one x with weights of one quantization, such as Q, K and V, or gate
       and up: one product with the packed rows concatenated, which `hoist-quantize` moves to the
       pack or prepare step, then `split`.
    2. `gather_qmm`s of one x with the same indices, such as gate and up of experts.
Leaves alone:
    1. weights that change from call to call, or that something else reads: both forms would stay.
    2. products whose rows are so short that splitting the result costs more than merging saves.
    3. products with another quantization, dtype of scales, or a stream or kernel of their own.
    4. CPUs: one product took 0.9 to 1.2 times as long there as its parts, which can also run side
       by side on several streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.invariance import fixed_values
from qgraph.ir import Graph, Node, Value
from qgraph.ledger import Entry, record
from qgraph.names import body_inputs, outermost
from qgraph.rewrite import Visit, rewrite, setting
from qgraph.target import Target, as_target
from qgraph.tensor import Tensor, apply

from .products import INDICES, PARTS, is_open, parts_of

_NAME = "merge-matmuls"
_SETTINGS = ("group_size", "bits", "mode", "transpose")


@dataclass(frozen=True)
class Rates:
    """What merging and splitting cost on a backend, measured (mlx 0.32.4).

    Attributes:
        launch_us: of one operation more, microseconds.
        copy: bytes a microsecond, read plus written, of copying parts of rows.
        flops: operations a microsecond of the products on many rows.
    """

    launch_us: float
    copy: float
    flops: float


RATES = {
    "cuda": Rates(launch_us=2.5, copy=4.3e6, flops=0.24e9),
    # Never measured: an Apple M2 by its data sheet, 100 GB/s and 3.6 teraflops.
    "metal": Rates(launch_us=5.0, copy=1e5, flops=3.6e6),
}
TOLERATED = 0.05
"""Share of the product's own time that a split may cost beyond what merging saves."""


@dataclass(frozen=True)
class MergeMatmuls:
    """See the module."""

    target: Target | None = None
    name: str = _NAME
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        rates = RATES.get(as_target(self.target).backend)
        if rates is None:
            return graph
        fixed = fixed_values(graph)
        alone = fixed - _read_twice(graph)
        return rewrite(graph, lambda inner: _visitor(inner, fixed, alone, rates), self.name)


def _read_twice(graph: Graph) -> set[Value]:
    """Values that several nodes read or return, in bodies too, under each of their names."""
    roots = outermost(graph)
    reads: Counter[Value] = Counter(graph.outputs)
    for _, node in graph.walk():
        passed_on = {outer for _, shared in body_inputs(node) for _, outer in shared}
        reads.update(roots.get(v, v) for v in set(node.inputs) - passed_on)
        reads.update(roots.get(v, v) for body in node.bodies for v in body.outputs)
    twice = {value for value, times in reads.items() if times > 1}
    return twice | {inner for inner, root in roots.items() if root in twice}


def _visitor(graph: Graph, fixed: set[Value], alone: set[Value], rates: Rates) -> Visit:
    groups: dict[object, list[Node]] = {}
    for node in graph.nodes:
        if is_open(node, fixed) and node.operand("w") in alone:
            groups.setdefault(_key(node), []).append(node)
    merged: dict[int, list[Node]] = {}
    for nodes in groups.values():
        if len(nodes) > 1 and _pays(nodes, rates):
            merged.update((node.serial, nodes) for node in nodes)
    results: dict[int, Value] = {}
    places = iter(graph.nodes)

    def visit(node: Node) -> Sequence[Value] | None:
        old = next(places)
        nodes = merged.get(old.serial)
        if nodes is None:
            return None
        if old.serial not in results:
            parts = _merge(nodes, node)
            results.update((n.serial, part.value) for n, part in zip(nodes, parts, strict=True))
        return [results[old.serial]]

    return visit


def _key(node: Node) -> object:
    """What products to be merged have in common."""
    gathers = node.op == "gather_qmm"
    first = node.operand("w").type.shape
    kept = first[:-2] if setting(node, "transpose") else first[:-1]
    return (
        node.op,
        node.operand("x"),
        *(setting(node, name) for name in _SETTINGS),
        *((*map(node.value, INDICES), setting(node, "sorted_indices")) if gathers else ()),
        kept,
        first[-1] if setting(node, "transpose") else None,
        tuple(part.dtype for part in parts_of(node)),
    )


def _pays(nodes: Sequence[Node], rates: Rates) -> bool:
    x, columns = nodes[0].operand("x"), sum(node.output.shape[-1] for node in nodes)
    rows = nodes[0].output.type.size // nodes[0].output.shape[-1]
    if rows == 1:  # parts of one row lie together: nothing is copied
        return True
    split = 2 * rows * columns * nodes[0].output.dtype.size / rates.copy
    product = 2 * rows * columns * x.shape[-1] / rates.flops
    saved = rates.launch_us * (len(nodes) - 1)
    if split <= saved + TOLERATED * product:
        return True
    why = f"splitting the result costs {split:.0f} µs, one product less saves {saved:.0f}"
    for node in nodes:
        what = f"{node.op} of {x.type}"
        record(Entry(_NAME, "refused", what, node.origin, f"not merged: {why}"))
    return False


def _merge(nodes: Sequence[Node], first: Node) -> list[Tensor]:
    axis = -2 if setting(first, "transpose") else -1
    columns = [node.output.shape[-1] for node in nodes]
    args = dict(first.args)
    for name, parts in zip(PARTS, zip(*map(parts_of, nodes), strict=True), strict=False):
        args[name] = apply("concatenate", (list(parts), axis)).value
    out = first.output.type
    wide = type(out)((*out.shape[:-1], sum(columns)), out.dtype)
    product = first.replace(args=args, types=[wide])
    ends = [sum(columns[: i + 1]) for i in range(len(columns) - 1)]
    names = " + ".join(_name(node) for node in nodes)
    for node in nodes:
        what = f"{node.op} of {node.operand('x').type}"
        record(
            Entry(_NAME, "merged", what, node.origin, f"one product for {names}", name=_name(node))
        )
    return list(apply("split", (Tensor(product.output), ends), {"axis": out.ndim - 1}))


def _name(node: Node) -> str:
    value = node.operand("w")
    return str(value.node.args.get("name") or value.type)
