"""Telling the primitives into which MLX expands an op on CPUs, to make the op of them again.

A pass guesses from a few tell-tale nodes which op stands behind a value, with which operands and
settings.  MLX itself then expands that op for just these types and settings, and the guess holds
only if every primitive, setting and constant is the same.  So a guess may be careless, and what is
raised computes, on a CPU, what stood there bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.importer.expansions import expansion, with_none
from qgraph.ir.graph import Graph, Node, Value, is_scalar
from qgraph.ir.ops import OPS
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import Visit, rewrite
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor, apply

from ..eliminate_dead_code import EliminateDeadCode

Bindings = dict[Value, Value]


@dataclass(frozen=True)
class Expansion:
    """`root` is what `op` gives for `operands` and `settings`, or so a pass guesses."""

    root: Value
    op: str
    operands: Mapping[str, Value]
    settings: Mapping[str, Any]

    def given(self, name: str, operand: Value, root: Value) -> Expansion:
        """The same with one operand more, and where it then ends."""
        return replace(self, root=root, operands={**self.operands, name: operand})

    @property
    def holds(self) -> bool:
        """Is it so?"""
        types = tuple((name, value.type) for name, value in self.operands.items())
        pattern = expansion(self.op, types, tuple(self.settings.items()))
        if pattern is None or pattern.outputs[0].type != self.root.type:
            return False
        bound = dict(zip(pattern.inputs, self.operands.values(), strict=True))
        return matches(pattern.outputs[0], self.root, bound)


@dataclass(frozen=True)
class Raising(ABC):
    """A pass that raises what its `find` finds; a subclass gives `find` and a name."""

    target: Target | None = None
    name: str = ""

    @property
    def contract(self) -> str:
        """On a CPU MLX expands the op again, to the same bits.

        On a GPU it has a kernel, which rounds elsewhere.  The expansion itself was up to 0.007 from
        float64 in bfloat16; in float32 products may be in TF32, and rotations at position 5000 were
        5e-5 off.
        """
        return "exact" if as_target(self.target).is_cpu else "tolerance 2e-2"

    def __call__(self, graph: Graph) -> Graph:
        return raise_expansions(graph, self.find, self.name)

    @abstractmethod
    def find(self, graph: Graph) -> Iterable[Expansion]:
        """What stands in one graph, without its bodies; all of it must hold."""


Find = Callable[[Graph], Iterable[Expansion]]


def raise_expansions(graph: Graph, find: Find, made_by: str, case: int = 0) -> Graph:
    """Put the one op in the place of each expansion that `find` gives; it must hold.

    What only the expansion needed goes, so that the passes to come have less to do.
    """

    def visitor(inner: Graph) -> Visit | None:
        found = {e.root.node.serial: e for e in find(inner)}
        if not found:
            return None
        now: dict[Value, Value] = {}

        def visit(node: Node, old: Node) -> Sequence[Value] | None:
            now.update(zip(old.outputs, node.outputs, strict=True))
            guess = found.get(old.serial)
            if guess is None:
                return None
            operands = {n: Tensor(now.get(v, v)) for n, v in guess.operands.items()}
            args = with_none(guess.op, {**guess.settings, **operands})
            result = _called(guess.op, args).value
            now[old.output] = result
            record(_entry(guess, old, made_by, case))
            return [result]

        return visit

    raised = rewrite(graph, visitor, made_by)
    return raised if raised is graph else EliminateDeadCode()(raised)


def _called(op: str, args: Mapping[str, Any]) -> Tensor:
    parameters = OPS[op].signature.parameters.values()
    places = [p.name for p in parameters if p.kind == p.POSITIONAL_ONLY]
    named = {name: arg for name, arg in args.items() if name not in places}
    result: Tensor = apply(op, tuple(args[name] for name in places), named)
    return result


def _entry(guess: Expansion, root: Node, made_by: str, case: int) -> Entry:
    first = next(iter(guess.operands.values()))
    weights = [v.node for v in guess.operands.values() if v.node.op == "constant"]
    name = next((n for w in weights if (n := w.args["name"])), "")
    reason = "its primitives are one again"
    return Entry(
        made_by, "rewritten", guess.op, root.origin, reason, case, str(name), (first.type,)
    )


def matches(
    pattern: Value, value: Value, bound: Bindings, known: Mapping[Value, Value] | None = None
) -> bool:
    """Is `value` computed as `pattern` is?  Binds those inputs of the pattern that are not yet.

    Args:
        known: the constants that inputs of a loop's body stand for, by `names.constants_behind`.
    """
    known = known or {}
    pending = [(pattern, value)]
    seen: set[tuple[Value, Value]] = set()
    while pending:
        p, v = pair = pending.pop()
        if p.node.op == "input":
            if p.type != v.type or bound.setdefault(p, v) is not v:
                return False
        elif pair not in seen:
            seen.add(pair)
            v = known.get(v, v)
            if not _alike(p, v):
                return False
            pending.extend(zip(p.node.inputs, v.node.inputs, strict=True))
    return True


def _alike(p: Value, v: Value) -> bool:
    a, b = p.node, v.node
    if a.op != b.op or p.type != v.type or p.index != v.index or len(a.inputs) != len(b.inputs):
        return False
    if a.op == "constant":
        x, y = a.args["data"], b.args["data"]
        return not y.is_released and mx.array_equal(x.array, y.array).item() is True
    return not b.bodies and b.stream is None and a.attrs == b.attrs


def peel(value: Value, *ops: str) -> Value:
    """What `value` was before the ops, each taken off at most once and in this order.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.broadcast_to(qg.expand_dims(x, 0), (3, 4)), qg.spec(4))
    >>> peel(graph.outputs[0], "broadcast_to", "expand_dims")
    <input:0 f32[4]>
    """
    for op in ops:
        if value.node.op == op:
            value = value.node.inputs[0]
    return value


def layers(value: Value, *ops: str) -> list[Value]:
    """What `value` was before any of the ops, the innermost first, `value` itself last."""
    found = [value]
    while found[-1].node.op in ops:
        found.append(found[-1].node.inputs[0])
    return found[::-1]


def number(value: Value) -> float | None:
    """The number that a constant without axes holds, broadcast or not.

    A float is the shortest decimal that its float32 stands for: 1e-05, not 9.999999747378752e-06.
    """
    value = peel(value, "broadcast_to")
    if not is_scalar(value) or value.node.args["data"].is_released:
        return None
    found: Any = value.node.args["data"].array.item()
    return float(str(np.float32(found))) if isinstance(found, float) else found


def reads(graph: Graph, value: Value, op: str) -> Iterator[Node]:
    """The nodes of `op` that read `value`, as it is or broadcast."""
    for node in graph.users.get(value, ()):
        if node.op == op:
            yield node
        elif node.op == "broadcast_to":
            yield from (n for n in graph.users.get(node.output, ()) if n.op == op)
