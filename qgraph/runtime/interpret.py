"""Calling MLX node by node: what a compiled stretch does while `mx.compile` traces it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..ir.graph import Graph, Node, Value, map_values
from ..ir.loops import CONTROL_FLOW, LOOPS, turns
from ..ir.ops import OPS
from ..kernels.chosen import runs_on_host, streams_in_use
from ..kernels.streams import Streams
from .positions import Tables, has_tables

UNROLL_NODES = 2048
"""A loop unrolls while its turns hold no more nodes than this together."""

Arrays = Sequence[mx.array]
Env = dict[Value, Any]


class Interpreter:
    """Calls MLX for nodes, with arrays for the values in an environment.

    Within one interpreter an op with several results runs once for the same arguments.  Tracing
    several equal ones under `mx.compile` (0.32.4) can fail with "IndexError: _Map_base::at".
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._tables = Tables()
        self._several: dict[Any, tuple[list[mx.array], Sequence[mx.array]]] = {}

    def run(self, node: Node, env: Env) -> None:
        """Add the results of `node` to `env`."""
        if node.op in LOOPS:
            self._unroll(node, env)
        elif node.op == "constant":
            env[node.output] = node.args["data"].array
        elif len(node.outputs) == 1:
            result = self._call(node, env)
            env[node.output] = result if isinstance(result, mx.array) else result[0]
        else:
            inputs = [env[v] for v in node.inputs]
            key = (node.op, repr(node.attrs), repr(node.stream), *map(id, inputs))
            if key not in self._several:
                # The inputs are kept with the results, so that their identities stay theirs.
                self._several[key] = (inputs, self._call(node, env))
            env.update(zip(node.outputs, self._several[key][1], strict=True))

    def _call(self, node: Node, env: Env) -> Any:
        op = OPS[node.op]
        args = {name: map_values(arg, env.__getitem__) for name, arg in node.args.items()}
        if has_tables(node, self._streams.device):
            result = self._tables.call(node, args)
            if result is not None:
                return result
        stream = self._streams.resolve(node.stream)
        if op.kind == "chosen kernels":
            token = streams_in_use.set(self._streams)
            try:
                return op.call(args)
            finally:
                streams_in_use.reset(token)
        if stream is None or op.kind != "local":
            return op.call(args, stream)
        with mx.stream(stream):
            return op.call(args)

    def _run_body(self, body: Graph, inputs: Arrays) -> list[mx.array]:
        env: Env = dict(zip(body.inputs, inputs, strict=True))
        for node in body.nodes:
            self.run(node, env)
        return [env[value] for value in body.outputs]

    def _unroll(self, node: Node, env: Env) -> None:
        carried = [env[v] for v in node.args["carried"]]
        invariants = [env[v] for v in node.args["invariants"]]
        body = node.bodies[0]
        if node.op == "fori_loop":
            for i in range(node.args["lower"], node.args["upper"]):
                carried = self._run_body(body, [mx.array(i, mx.int32), *carried, *invariants])
            env.update(zip(node.outputs, carried, strict=True))
            return

        def turn(i: int, carried: list[mx.array]) -> list[mx.array]:
            slices = [env[v][i] for v in node.args["xs"]]
            return self._run_body(body, [*carried, *slices, *invariants])

        env.update(zip(node.outputs, scan_turns(node, carried, turn), strict=True))


def scan_turns(
    node: Node,
    carried: list[mx.array],
    turn: Callable[[int, list[mx.array]], list[mx.array]],
    settle: Callable[[list[mx.array]], None] = lambda _: None,
) -> list[mx.array]:
    """Run a scan's turns in order, stacking what they give.

    A turn may empty the list of values that it is given, and `settle` is called after it: nothing
    holds those values then, and their buffers can be written again.
    """
    count, kept = node.args["length"], len(carried)
    stacked: list[list[mx.array]] = [[] for _ in node.outputs[kept:]]
    for i in reversed(range(count)) if node.args["reverse"] else range(count):
        results = turn(i, carried)
        carried = results[:kept]
        for column, y in zip(stacked, results[kept:], strict=True):
            column.append(y)
        settle(results)
        del results
    if node.args["reverse"]:
        for column in stacked:
            column.reverse()
    types = [v.type for v in node.outputs[kept:]]
    ys = [
        mx.stack(c) if c else mx.zeros(t.shape, t.dtype)
        for c, t in zip(stacked, types, strict=True)
    ]
    return [*carried, *ys]


def unrolls(node: Node) -> bool:
    """Does this loop unroll inside `mx.compile`?"""
    count = turns(node)
    if count is None:
        return False
    if any(runs_on_host(n.op, n.args) for n in node.bodies[0].nodes):
        return False
    inner = [n for n in node.bodies[0].nodes if n.op in CONTROL_FLOW]
    return count * unrolled_size(node.bodies[0]) <= UNROLL_NODES and all(map(unrolls, inner))


def unrolled_size(graph: Graph) -> int:
    """Nodes of a body once its own loops are unrolled."""
    return sum(
        (turns(n) or 1) * unrolled_size(n.bodies[0]) if n.op in LOOPS else 1
        for n in graph.nodes
        if n.op != "constant"
    )
