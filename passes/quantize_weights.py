"""Quantize float weights, as a `Quantize` says: `w` becomes `dequantize(quantize(w))`.

The passes after this one fuse that into the products and look-ups that read the weight, and move
`quantize` to the pack step.

Quantizes:
    1. weights of products: `matmul`, `addmm`, `gather_mm` and what else is a product, read through
       transposes, reshapes and casts, or in slices of whole rows.
    2. tables whose rows are looked up along the first axis.
    3. weights that loops and branches take or carry unchanged, and stacks that a `scan` goes
       through: `sink-dequantize` takes them inside.
    4. parameters, in the prepare step.
    5. weights that a fit found better numbers for: its codes and scales become constants, and
       nothing is left to pack.
Leaves alone, with the reason in the ledger:
    1. weights whose last axis the group size does not divide.
    2. weights that anything else reads too, or a product with no quantized form: they would be made
       dense at every call.
    3. what `where` does not want; rules that match nothing are reported.
    4. biases, which experts look up as an embedding does its rows.
Weights that are packed already are not floats, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qgraph.errors import QGraphError
from qgraph.ir.graph import Graph, Node, Value, constant_value, input_value
from qgraph.ir.kinds import PRODUCTS, SAME_ELEMENTS
from qgraph.ir.loops import body_inputs
from qgraph.ir.ops import setting
from qgraph.origin import stating
from qgraph.quantization.calls import dequantize, quantize
from qgraph.quantization.config import Quantize
from qgraph.quantization.fitted import Fitted, mark_of
from qgraph.quantization.modes import FLOATS
from qgraph.rewrite.contracts import ROUNDED_WEIGHTS
from qgraph.rewrite.ledger import Decision, Entry, record
from qgraph.tracing.tensor import Tensor
from qgraph.types import TensorType

from .shared.contraction import as_contraction
from .shared.indexing import index_of
from .shared.invariants import as_invariants
from .shared.weight_view import Packed, WeightView, as_operand, resolve

_NAME = "quantize-weights"


@dataclass(frozen=True)
class QuantizeWeights:
    """See the module."""

    config: Quantize
    name: str = _NAME
    contract: str = ROUNDED_WEIGHTS

    def __call__(self, graph: Graph) -> Graph:
        given, graph = graph, as_invariants(graph, self.name)
        weights = [n.output for n in graph.constants()]
        weights += [v for v in graph.inputs if v.node.args["parameter"]]
        chosen: dict[Value, Quantize] = {}
        used: set[str] = set()
        for value in weights:
            if value.ndim >= 2 and value.dtype in FLOATS:
                self._choose(graph, value, chosen, used)
        for pattern in self.config.patterns():
            if pattern not in used:
                reason = "this rule matched no weight; see the names in print(graph)"
                record(Entry(_NAME, "refused", reason=reason, about=f"rule {pattern!r}"))
        return _insert(graph, chosen, self.config.fitted or {}) if chosen else given

    def _choose(
        self, graph: Graph, value: Value, chosen: dict[Value, Quantize], used: set[str]
    ) -> None:
        roles = _roles(graph, value)
        if not roles & {"product", "rows", "head"}:
            for op in sorted(roles & PRODUCTS):
                _note(value, "refused", f"no quantized product does what {op} does with it")
            return
        name = str(value.node.args["name"])
        if name.rpartition(".")[2] == "bias":
            _note(value, "kept", "a bias, as experts have one for each, is looked up and added")
            return
        pattern = self.config.matching(name)
        if pattern is not None:
            used.add(pattern)
        answer = self.config.answer(
            name, value.shape, is_embedding="rows" in roles, is_head="head" in roles
        )
        others = roles - {"product", "rows", "head"}
        if answer is None:
            _note(value, "kept", "no rule wants it quantized")
        elif value.shape[-1] % (size := answer.settings["group_size"]):
            _note(value, "refused", f"group_size={size} does not divide {value.shape[-1]}")
        elif (reason := _refusal(value, answer)) is not None:
            _note(value, "refused", reason)
        elif others:
            _note(value, "refused", f"{', '.join(sorted(others))} reads it too and needs it dense")
        else:
            how = f"{answer.bits} bits, groups of {size}, {answer.mode}"
            numbers = _numbers(value, answer, self.config.fitted or {})
            if isinstance(numbers, Fitted):
                how += f", numbers by {numbers.method}"
            elif numbers:
                how += f"; {numbers}"
            _note(value, "chosen", how)
            chosen[value] = answer


def _numbers(value: Value, answer: Quantize, fitted: Mapping[str, Fitted]) -> Fitted | str | None:
    """What a fit found for a weight, or why that does not count."""
    found = fitted.get(str(value.node.args["name"]))
    if found is None:
        return None
    if found.settings != answer.settings:
        return f"rounded, as its fit was for {found.bits} bits, groups of {found.group_size}, " + (
            found.mode
        )
    if value.node.op != "constant" or found.shape != value.shape:
        return "rounded, as its fit was for a constant of another shape"
    data = value.node.args["data"]
    if not data.is_released and (data.mark or (lambda: mark_of(data.array)))() != found.mark:
        return "rounded, as its fit was for other numbers than the weight has now"
    return found


def _refusal(value: Value, config: Quantize) -> str | None:
    """Why MLX cannot quantize a weight of this type so, as `nvfp4` of an odd number of groups."""
    try:
        quantize(Tensor(value), **config.settings)
    except QGraphError as error:
        return error.what
    return None


def _note(value: Value, decision: Decision, reason: str) -> None:
    name = str(value.node.args["name"])
    origin, types = value.node.origin, (value.type,)
    record(Entry(_NAME, decision, "", origin, reason, name=name, types=types))


def _roles(graph: Graph, weight: Value) -> set[str]:
    """What the weight is to those that read it: "product", "rows", "head", or other ops' names."""
    found: set[str] = set()
    pending = [(graph, weight, weight, True)]
    while pending:
        where, value, start, outer = pending.pop()
        if value in where.outputs:
            found.add("output")
        for node in where.users.get(value, ()):
            if node.bodies:
                passed = _inner_values(node, value)
                found |= set() if passed else {node.op}
                pending += [(body, inner, inner, False) for body, inner in passed]
            elif node.op in SAME_ELEMENTS:
                pending.append((where, node.output, start, outer))
            elif _fuses(node, value):
                found.add("head" if outer and _is_result(graph, node) else "product")
                if node.inputs.count(value) > 1:  # it multiplies itself, or is added too
                    found.add(node.op)
            elif node.op == "gather_mm" and node.operand("b") is value:
                found.add("product")
            elif value is start and _is_lookup(node):
                found.add("rows")
            elif slices := _slices(node):
                pending += [(where, part, part, outer) for part in slices]
            else:
                found.add(node.op)
    return found


def _fuses(node: Node, value: Value) -> bool:
    """Would `node` become a quantized product, were `value` quantized?  Asked of a trial."""
    if value.ndim < 2:
        return False
    if value.shape[-1] % 16:
        return bool(list(as_contraction(node)))  # no format fits: that is what to tell
    trial = _packed_like(value)
    weights = [resolve(p.weight.value) for p in as_contraction(node.with_inputs({value: trial}))]
    return any(isinstance(w, WeightView) and isinstance(as_operand(w), Packed) for w in weights)


def _packed_like(value: Value) -> Value:
    """A `dequantize` of the type of `value`, to ask about; nothing is quantized for it."""
    *rows, columns = value.shape
    w = input_value(TensorType((*rows, columns // 8), mx.uint32))
    scales = input_value(TensorType((*rows, columns // 16), mx.uint8))
    args = {"w": w, "scales": scales, "group_size": 16, "bits": 4, "mode": "nvfp4"}
    return Node("dequantize", args, [value.type]).output


def _slices(node: Node) -> tuple[Value, ...]:
    """What `node` gives, if it is whole rows of its operand, as many as stand in its text."""
    if node.op == "split":
        last = node.output.ndim - 1
        return node.outputs if setting(node, "axis") % (last + 1) < last else ()
    if node.op != "getitem" or any(v.ndim for v in node.inputs[1:]):
        return ()
    parts = index_of(node)
    rows = len(parts) < node.operand("a").ndim and node.output.ndim > 1
    return node.outputs if rows and all(p is not None and p is not ... for p in parts) else ()


def _is_lookup(node: Node) -> bool:
    """Does it take rows of a table, by indices along the first axis?"""
    if node.op == "take":
        return bool(setting(node, "axis") == 0)
    parts = index_of(node) if node.op == "getitem" else ()
    return len(parts) == 1 and isinstance(parts[0], Value)


def _inner_values(node: Node, value: Value) -> list[tuple[Graph, Value]]:
    """What stands for `value` in a loop: invariants, slices of a stack; none if it is carried."""
    if value in node.args.get("carried", ()):
        return []
    found = [
        (body, inner)
        for body, (_, shared) in zip(node.bodies, body_inputs(node), strict=True)
        for inner, source in shared
        if source is value
    ]
    stacks = node.args.get("xs", ())
    slices = node.bodies[0].inputs[len(node.args["carried"]) :]
    whole = [v for v, stack in zip(slices, stacks, strict=False) if stack is value]
    if whole and value.ndim < 3:
        return []
    return found + [(node.bodies[0], inner) for inner in whole]


def _is_result(graph: Graph, node: Node) -> bool:
    """Is the product an output of the graph, but for views, casts and an added bias?"""
    value = node.output
    while value not in graph.outputs:
        readers = graph.users.get(value, ())
        if len(readers) != 1 or readers[0].op not in SAME_ELEMENTS | {"add"}:
            return False
        value = readers[0].output
    return True


def _insert(graph: Graph, chosen: Mapping[Value, Quantize], fitted: Mapping[str, Fitted]) -> Graph:
    """The graph with `dequantize(quantize(w))` in the place of the chosen weights."""
    nodes: list[Node] = []
    replace: dict[Value, Value] = {}
    for value in graph.inputs:
        if value in chosen:
            nodes += _through_quantize(value, chosen[value], replace, fitted)
    for node in graph.nodes:
        new = node.with_inputs(replace)
        nodes.append(new)
        replace.update(zip(node.outputs, new.outputs, strict=True))
        if node.op == "constant" and node.output in chosen:
            nodes += _through_quantize(node.output, chosen[node.output], replace, fitted)
    return graph.replace(nodes=nodes, outputs=[replace.get(v, v) for v in graph.outputs])


def _through_quantize(
    value: Value, config: Quantize, replace: dict[Value, Value], fitted: Mapping[str, Fitted]
) -> Sequence[Node]:
    numbers = _numbers(value, config, fitted)
    with stating(value.node.origin.by(_NAME)):
        parts: Any
        if isinstance(numbers, Fitted):
            parts = _constants(value, numbers)
        else:
            parts = quantize(Tensor(value), **config.settings)
        settings: dict[str, Any] = {**config.settings, "dtype": value.dtype}
        dense: Value = dequantize(*parts, **settings).value
    replace[value] = dense
    made = dict.fromkeys(part.value.node for part in parts)
    return [*made, dense.node]


def _constants(value: Value, numbers: Fitted) -> list[Tensor]:
    """The parts of a fitted weight, named as in a checkpoint."""
    name = str(value.node.args["name"])
    stem = name.removesuffix(".weight")
    names = (name, f"{stem}.scales", f"{stem}.biases")
    origin = value.node.origin.by(_NAME)
    return [
        Tensor(constant_value(part, name, origin))
        for part, name in zip(numbers.parts, names, strict=False)
    ]
