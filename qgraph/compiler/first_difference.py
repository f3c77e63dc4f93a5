"""The first node of a graph that gives something else than what took its place, in loops too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..analysis.matching import match
from ..ir.graph import Graph, Node, Value
from ..ir.loops import bodies, body_inputs, runs
from ..kernels.streams import Streams
from ..runtime.interpret import Env, Interpreter, unrolls
from ..runtime.lower import LoweredGraph

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
        """Which body of a loop runs on which inputs, in order; of a long loop the first turns."""
        shared = [[env[outer] for _, outer in body.shared] for body in bodies(node)]
        steps = runs(node, env.__getitem__)
        last, turns = len(node.bodies) - 1, 0
        try:
            which, own = next(steps)
            while turns < TURNS:
                inputs = [*own, *shared[which]]
                yield which, inputs
                turns += which == last
                which, own = steps.send(self._run(node.bodies[which], inputs))
        except StopIteration:
            return

    def _run(self, body: Graph, inputs: Arrays) -> list[mx.array]:
        env = values(body, inputs, self.device)
        return [env[v] for v in body.outputs]


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
