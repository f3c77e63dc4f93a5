"""The first node of a graph that gives something else than what took its place, in loops too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..analysis.matching import match
from ..ir.graph import Graph, Node, Value
from ..ir.loops import body_inputs, invariant_names
from ..kernels.streams import Streams
from ..runtime.interpret import Env, Interpreter, unrolls
from ..runtime.lower import LoweredGraph
from ..types import as_int

Arrays = Sequence[mx.array]

TURNS = 64
"""Of a loop that are searched; what differs later only is told of the loop itself."""


def pairs(before: Graph, after: Graph, replaced: Mapping[Value, Value]) -> dict[Value, Value]:
    """What each value became: as the pass noted it, or, if it noted nothing, by likeness."""
    if replaced:
        return dict(replaced)
    alike = match(before, after)
    return {
        old: new for a, b in alike.items() for old, new in zip(a.outputs, b.outputs, strict=False)
    }


def values(graph: Graph, arrays: Arrays, device: mx.Device) -> Env:
    """Every value of a graph, its bodies' apart, from those of its inputs.

    Nothing is compiled but the bodies of long loops: equal ops of several results in an unrolled
    loop would fail under `mx.compile` (0.32.4).
    """
    env: Env = dict(zip(graph.inputs, arrays, strict=True))
    streams = Streams(device)
    for node in graph.nodes:
        if node.bodies and not unrolls(node):
            alone = Graph("node", node.inputs, [node], node.outputs)
            results = LoweredGraph(alone, {}, streams)([env[v] for v in node.inputs])
            env.update(zip(node.outputs, results, strict=True))
        else:
            Interpreter(streams).run(node, env)
    return env


@dataclass(frozen=True)
class Search:
    """Two graphs whose values should be the same.

    Attributes:
        pairs: which value took which one's place; others are themselves.
        differ: how two arrays differ beyond what is allowed, in words, or "".
    """

    pairs: Mapping[Value, Value]
    differ: Callable[[mx.array, mx.array], str]
    device: mx.Device

    def first(
        self, old: Graph, new: Graph, inputs: Arrays, new_inputs: Arrays
    ) -> tuple[Node, str] | None:
        """The first node of `old` whose result differs, the innermost one, and how."""
        before, after = (
            values(old, inputs, self.device),
            values(new, new_inputs, self.device),
        )
        for node in old.nodes:
            for value in node.outputs:
                other = self.pairs.get(value, value)
                if other not in after or other.node.op == "input":
                    continue
                how = self.differ(before[value], after[other])
                if how:
                    return self._inside(node, other.node, before, after) or (node, how)
        return None

    def _inside(self, old: Node, new: Node, before: Env, after: Env) -> tuple[Node, str] | None:
        """Look into a loop or branch, turn after turn of what it was."""
        if not old.bodies or old.op != new.op:
            return None
        for which, inputs in self._runs(old, before):
            body, now = old.bodies[which], new.bodies[which]
            known = dict(zip(body.inputs, inputs, strict=True))
            given = _given(new, which, known, after)
            found = None if given is None else self.first(body, now, inputs, given)
            if found is not None:
                return found
        return None

    def _runs(self, node: Node, env: Env) -> Iterator[tuple[int, list[mx.array]]]:
        """Which body of a loop runs on which inputs, in order."""

        def given(name: str) -> list[mx.array]:
            return [env[v] for v in node.args.get(name, ())]

        carried = given("carried")
        if node.op == "cond":
            which = 0 if env[node.operand("pred")].item() else 1
            yield which, [*carried, *given(invariant_names(node)[which])]
            return
        last = len(node.bodies) - 1
        for own in self._turns(node, env):
            if node.op == "while_loop":
                test = [*carried, *given("cond_invariants")]
                yield 0, test
                if not self._run(node.bodies[0], test)[0].item():
                    return
            index = own[:1] if node.op == "fori_loop" else []
            slices = own if node.op == "scan" else []
            inputs = [*index, *carried, *slices, *given("invariants")]
            yield last, inputs
            carried = self._run(node.bodies[last], inputs)[: len(carried)]

    def _turns(self, node: Node, env: Env) -> Iterator[list[mx.array]]:
        """What each turn gets besides what is carried: the counter, or slices."""
        if node.op == "fori_loop":
            lower, upper = (_bound(node.args[name], env) for name in ("lower", "upper"))
            for i in range(lower, min(upper, lower + TURNS)):
                yield [mx.array(i, mx.int32)]
        elif node.op == "scan":
            turns = range(node.args["length"])
            for i in list(reversed(turns) if node.args["reverse"] else turns)[:TURNS]:
                yield [env[v][i] for v in node.args["xs"]]
        else:
            for _ in range(TURNS):
                yield []

    def _run(self, body: Graph, inputs: Arrays) -> list[mx.array]:
        env = values(body, inputs, self.device)
        return [env[v] for v in body.outputs]


def _bound(bound: Any, env: Env) -> int:
    return as_int(env[bound]) if isinstance(bound, Value) else int(bound)


def _given(new: Node, which: int, known: Mapping[Value, mx.array], after: Env) -> Arrays | None:
    """The inputs of a rebuilt body, from those of the body it was; None if they are others."""
    own, shared = body_inputs(new)[which]
    if any(value not in known for value in own):
        old = list(known.values())
        if len(old) != len(new.bodies[which].inputs):
            return None
        known = dict(zip(new.bodies[which].inputs, old, strict=True))
    rest = [known[v] if v in known else after[outer] for v, outer in shared]
    return [*(known[v] for v in own), *rest]
