"""Quantized products that share their input become one, whose result is split.

One product of N1 + N2 columns costs a GPU less than two: an operation less to launch, and more
work at once.

Rewrites (each exact: a column of the result is one row of the weight):
    1. `quantized_matmul`s of one x with weights of one quantization, such as Q, K and V, or gate
       and up: one product with the packed rows concatenated, which `hoist-quantize` moves to the
       pack or prepare step, then `split`.
    2. `gather_qmm`s of one x with the same indices, such as gate and up of experts.
Leaves alone:
    1. weights that change from call to call.
    2. weights of which something else reads packed rows, scales or biases, as they are or in
       slices: both forms would stay.
    3. products whose rows are so short that splitting the result costs more than merging saves.
    4. products with another quantization, dtype of scales, or a stream or kernel of their own.
    5. CPUs: one product took 0.9 to 1.2 times as long there as its parts, which can also run side
       by side on several streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from qgraph.analysis.changes import fixed_values
from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.kinds import SAME_ELEMENTS
from qgraph.ir.loops import body_inputs
from qgraph.ir.ops import setting
from qgraph.rewrite.ledger import Decision, Entry, record, weight_name
from qgraph.rewrite.rewriter import Visit, rewrite
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor, apply

from .shared.products import INDICES, PARTS, is_open, parts_of

_NAME = "merge-matmuls"
_THROUGH = SAME_ELEMENTS | {"getitem", "split"}
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
        readers = _Readers.of(graph)
        return rewrite(graph, lambda inner: _visitor(inner, fixed, readers, rates), self.name)


@dataclass(frozen=True)
class _Readers:
    """Who reads what, through views and slices, in bodies too; None is who called.

    Attributes:
        source: what a view or slice is of; what a name inside a body stands for.
        found: the readers of a source.
    """

    source: Mapping[Value, Value]
    found: Mapping[Value, Sequence[Node | None]]

    @staticmethod
    def of(graph: Graph) -> _Readers:
        source: dict[Value, Value] = {}
        reads: list[tuple[Value, Node | None]] = [(value, None) for value in graph.outputs]
        for _, node in graph.walk():  # loops come before what is in their bodies
            passed_on = [pair for _, shared in body_inputs(node) for pair in shared]
            source.update((inner, source.get(outer, outer)) for inner, outer in passed_on)
            if node.op in _THROUGH and node.inputs:
                first, *read = node.inputs
                source.update(dict.fromkeys(node.outputs, source.get(first, first)))
            else:
                read = list(Counter(node.inputs) - Counter(outer for _, outer in passed_on))
            reads += [(value, node) for value in read]
            reads += [(value, node) for body in node.bodies for value in body.outputs]
        found: dict[Value, list[Node | None]] = {}
        for value, reader in reads:
            found.setdefault(source.get(value, value), []).append(reader)
        return _Readers(source, found)

    def behind(self, value: Value) -> Value:
        """What `value` is a view or slice of, or itself."""
        return self.source.get(value, value)


def _visitor(graph: Graph, fixed: set[Value], readers: _Readers, rates: Rates) -> Visit:
    groups: dict[object, list[Node]] = {}
    for node in graph.nodes:
        if is_open(node, fixed):
            groups.setdefault(_key(node), []).append(node)
    merged: dict[int, list[Node]] = {}
    for group in groups.values():
        nodes = _alone(group, readers) if len(group) > 1 else []
        if len(nodes) > 1 and _pays(nodes, rates):
            merged.update((node.serial, nodes) for node in nodes)
    results: dict[int, Value] = {}

    def visit(node: Node, old: Node) -> Sequence[Value] | None:
        nodes = merged.get(old.serial)
        if nodes is None:
            return None
        if old.serial not in results:
            parts = _merge(nodes, node)
            results.update((n.serial, part.value) for n, part in zip(nodes, parts, strict=True))
        return [results[old.serial]]

    return visit


def _alone(group: Sequence[Node], readers: _Readers) -> list[Node]:
    """Those of a group whose weights nothing else reads; of the others, the ledger says why."""
    members = set(group)
    size: Counter[Value] = Counter()
    for node in group:
        for part in parts_of(node):
            size[readers.behind(part.value)] += part.value.type.size
    alone = []
    for node in group:
        why = _why_not(node, members, size, readers)
        if why is None:
            alone.append(node)
        else:
            _note(node, "refused", f"not merged: {why}")
    return alone


def _why_not(
    node: Node, group: Collection[Node], size: Mapping[Value, int], readers: _Readers
) -> str | None:
    """What of the weight of `node` would stay as it is though `group` were one product.

    Args:
        size: elements that the group reads of each source.
    """
    for name, part in zip(PARTS, parts_of(node), strict=False):
        source = readers.behind(part.value)
        others = [reader for reader in readers.found[source] if reader not in group]
        if others:
            who = "the caller" if others[0] is None else others[0].op
            return (
                f"{who} reads `{name}` of its weight too, and both forms would stay; "
                f"let products of this input alone read it, or give {who} a copy"
            )
        if size[source] > source.type.size:
            return (
                f"products of this input read rows of `{name}` twice, and both would stay; "
                "multiply by them once"
            )
    return None


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
    rows = prod(nodes[0].output.shape[:-1])
    if rows == 1:  # parts of one row lie together: nothing is copied
        return True
    split = 2 * rows * columns * nodes[0].output.dtype.size / rates.copy
    product = 2 * rows * columns * x.shape[-1] / rates.flops
    saved = rates.launch_us * (len(nodes) - 1)
    if split <= saved + TOLERATED * product:
        return True
    why = f"splitting the result costs {split:.0f} µs, one product less saves {saved:.0f}"
    for node in nodes:
        _note(node, "refused", f"not merged: {why}")
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
    names = " + ".join(weight_name(w := node.operand("w")) or str(w.type) for node in nodes)
    reason = f"one product for {names}"
    for node in nodes:
        _note(node, "merged", reason)
    return list(apply("split", (Tensor(product.output), ends), {"axis": out.ndim - 1}))


def _note(node: Node, decision: Decision, reason: str) -> None:
    name, types = weight_name(node.operand("w")), (node.operand("x").type,)
    record(Entry.of(node, _NAME, decision, reason, name=name, types=types))
