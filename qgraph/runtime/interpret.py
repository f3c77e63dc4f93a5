"""Calling MLX node by node: what a compiled stretch does while `mx.compile` traces it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..analysis.meshes import is_collective
from ..ir.graph import Graph, Node, Value, map_values
from ..ir.kinds import MESSAGES
from ..ir.loops import CONTROL_FLOW, LOOPS, REGION, bodies, carry_out, turns
from ..ir.op import Op
from ..ir.ops import OPS
from ..kernels.chosen import runs_on_host, streams_in_use
from ..kernels.streams import Streams
from .positions import Tables, has_tables
from .regions.cuda.exchange import can_exchange, exchange
from .regions.cuda.region import KERNEL, GridRegion, Launched, Resident
from .regions.cuda.residual import ResidualRegion

UNROLL_NODES = 2048
"""A loop unrolls while its turns hold no more nodes than this together."""

Arrays = Sequence[mx.array]
Env = dict[Value, Any]


class Interpreter:
    """Calls MLX for nodes, with arrays for the values in an environment.

    Args:
        shares: the same op on the same arrays runs once.  `mx.compile` (0.32.4) merges equal arrays
            itself, but fails with "IndexError: _Map_base::at" where they come of an op with several
            results, as of a `quantize` in each turn of a loop that unrolls.
        grids: how regions are launched, by their bodies.
    """

    def __init__(
        self, streams: Streams, *, shares: bool = False,
        grids: Mapping[Graph, Launched | None] | None = None,
    ) -> None:  # fmt: skip
        self._shares = shares
        self._streams = streams
        self._tables = Tables()
        # The inputs are kept with the results, so that their identities stay theirs.
        self._made: dict[Any, tuple[list[mx.array], Sequence[mx.array]]] = {}
        self._settings: dict[Node, str] = {}
        self._last_collective: mx.array | None = None
        """What it gave, or where the launches are that it was one of."""
        self._behind: set[Value] = set()
        """What is computed from what the last collective gave, so that it comes after it anyway."""
        self._grids = grids or {}
        self._near: dict[int, tuple[mx.array, mx.array]] = {}
        """Positions that MLX keeps far from the GPU, by their identities, and copies beside it."""
        self.order: tuple[mx.array, mx.array] | None = None
        """The counters of the barrier and what the last launch gave; without, regions whose blocks
        wait for one another run by their bodies."""

    def run(self, node: Node, env: Env) -> None:
        """Add the results of `node` to `env`."""
        self._run(node, env)
        if any(v in self._behind for v in node.inputs):
            self._behind.update(node.outputs)

    def _run(self, node: Node, env: Env) -> None:
        if node.bodies:
            launch = self._grids.get(node.bodies[0]) if is_launched(node) else None
            if isinstance(launch, ResidualRegion):
                given = [env[v] for v in node.args["invariants"]]
                env.update(zip(node.outputs, launch(given), strict=True))
            elif launch is not None:
                self._launch(node, launch, env)
            else:
                self._unroll(node, env)
            return
        if node.op == "constant":
            env[node.output] = self.known(node.args["data"].array)
            return
        if not self._shares or node.op in MESSAGES:
            env.update(zip(node.outputs, self._results(node, env), strict=True))
            return
        inputs = [env[v] for v in node.inputs]
        if node not in self._settings:
            self._settings[node] = _settings(node)
        key = (self._settings[node], *map(id, inputs))
        if key not in self._made:
            self._made[key] = inputs, self._results(node, env)
        env.update(zip(node.outputs, self._made[key][1], strict=True))

    def known(self, array: mx.array) -> mx.array:
        """An evaluated array; one for all numbers that are the same, as MLX merges those too."""
        if array.ndim or not self._shares:
            return array
        key = f"{array.dtype} {array.item()!r}"
        return self._made.setdefault(key, ([], [array]))[1][0]

    def _results(self, node: Node, env: Env) -> Sequence[mx.array]:
        result = self._call(node, env)
        return [result] if isinstance(result, mx.array) else result

    def _call(self, node: Node, env: Env) -> Any:
        op = OPS[node.op]
        args = {name: map_values(arg, env.__getitem__) for name, arg in node.args.items()}
        if has_tables(node, self._streams.device):
            result = self._tables.call(node, args)
            if result is not None:
                return result
        stream = self._streams.resolve(node.stream)
        if op.kind == "collective":
            return self._talk(node, op, args)
        if op.kind == "chosen kernels":
            token = streams_in_use.set(self._streams)
            try:
                return op.call(args)
            finally:
                streams_in_use.reset(token)
        if stream is None or op.kind not in ("local", "placement"):
            return op.call(args, stream)
        with mx.stream(stream):
            return op.call(args)

    def _talk(self, node: Node, op: Op, args: dict[str, Any]) -> mx.array:
        """A collective, after the one before it: all ranks must issue them in one order."""
        name, peers = op.name.partition(".")[2], self._streams.peers
        is_behind = any(v in self._behind for v in node.inputs)
        self._behind = {node.output}
        if self.order is not None and peers is not None and can_exchange(name, args.get("x")):
            counters, last = self.order
            last = last if is_behind else self._after_the_last_collective(last)
            found, last = exchange(name, args["x"], peers, last)
            self.order, self._last_collective = (counters, last), last
            return found
        if "x" in args and not is_behind:
            args["x"] = self._after_the_last_collective(args["x"])
        result: mx.array = op.call(args, group=self._streams.group)
        self._last_collective = result
        return result

    def _after_the_last_collective(self, array: mx.array) -> mx.array:
        """An array that is there when the last collective is over.

        Those that depend on nothing of one another MLX might evaluate in any order, and a GPU carry
        out side by side if they share no array.
        """
        last = self._last_collective
        if last is None or last is array:
            return array
        (array,) = mx.depends([array], [last])
        if self._streams.device.type == mx.cpu:
            return array
        return mx.where(mx.array(True), array, last.flatten()[0].astype(array.dtype))

    def _launch(self, node: Node, grid: Resident, env: Env) -> None:
        """A region, after the one before it."""
        assert self.order is not None
        (body,) = node.bodies
        counters, last = self.order
        summed = any(map(is_collective, body.nodes))
        talked = summed or last is self._last_collective
        if summed:
            last = self._after_the_last_collective(last)
        given = [self._nearby(env[v]) for v in node.args["invariants"]]
        results, last = grid(given, counters, last)
        if talked:
            self._last_collective = last
        self.order = counters, last
        env.update(zip(node.outputs, results, strict=True))

    def _nearby(self, array: mx.array) -> mx.array:
        """A position several times.

        MLX (0.32.4) keeps arrays of up to 8 bytes in memory of the host, for which each launch
        would wait 3 µs.
        """
        if array.size != 1 or array.dtype != mx.int32:
            return array
        found = self._near.get(id(array))
        if found is None:
            several = array.reshape(1) + mx.zeros((4,), mx.int32)
            found = self._near[id(array)] = array, several
        return found[1]

    def _unroll(self, node: Node, env: Env) -> None:
        shared = [[env[outer] for _, outer in body.shared] for body in bodies(node)]

        def run(which: int, own: list[mx.array]) -> list[mx.array]:
            body = node.bodies[which]
            inside: Env = dict(zip(body.inputs, [*own, *shared[which]], strict=True))
            for inner in body.nodes:
                self.run(inner, inside)
            return [inside[value] for value in body.outputs]

        results = carry_out(node, env.__getitem__, run)
        env.update(zip(node.outputs, results, strict=True))


def is_launched(node: Node) -> bool:
    """Is it a region that CUDA carries out, within a compiled stretch?"""
    return node.op == REGION and node.kernel == KERNEL


def launched(nodes: Sequence[Node]) -> Iterator[Node]:
    """Such regions among nodes, and in their loops."""
    for node in nodes:
        if is_launched(node):
            yield node
        else:
            for body in node.bodies:
                yield from launched(body.nodes)


def grids_of(nodes: Sequence[Node], streams: Streams) -> dict[Graph, Launched | None]:
    """How regions are launched, by their bodies; None for those whose bodies run."""
    found: dict[Graph, Launched | None] = {}
    for node in launched(nodes):
        (body,) = node.bodies
        if body not in found:
            found[body] = GridRegion.on(node, streams.device, streams.peers)
    return found


def talks(nodes: Sequence[Node]) -> bool:
    """Are there collectives among nodes, or in their loops?"""
    return any(
        is_collective(node) or any(talks(body.nodes) for body in node.bodies) for node in nodes
    )


def has_several_results(nodes: Sequence[Node]) -> bool:
    """Is there an op with several results among nodes, or in their loops?"""
    return any(
        any(map(has_several_results, (body.nodes for body in node.bodies)))
        if node.bodies
        else len(node.outputs) > 1
        for node in nodes
    )


def _settings(node: Node) -> str:
    """All that a node computes with but its inputs, and where it takes those."""
    args = [(name, map_values(arg, lambda _: ...)) for name, arg in node.args.items()]
    return f"{node.op} {args} {node.stream!r}"


def unrolls(node: Node) -> bool:
    """Does this loop, or the body of a region, unroll inside `mx.compile`?"""
    count = turns(node)
    if count is None or node.op == "cond":
        return False
    if any(n.op == REGION and not is_launched(n) for n in node.bodies[0].nodes):
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
