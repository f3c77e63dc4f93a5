"""Lowering: a graph becomes Python that calls MLX, compiled wherever it runs straight on.

A stretch of nodes without loops is one `mx.compile`d function.  Short loops unroll inside it;
long ones, `while_loop`, `cond` and loops that hold them run from the host, their bodies lowered
in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx

from ..errors import QGraphError
from ..ir.graph import Graph, Node, Value
from ..ir.loops import CONTROL_FLOW, LOOPS, REGION, Body, bodies, carry_out
from ..kernels import kernel
from ..kernels.chosen import runs_on_host
from ..kernels.compiled import Compiled, Uncompiled
from ..kernels.cpu.region import RegionError
from ..kernels.streams import Streams
from .by_mlx import refuse_shapeless
from .interpret import (
    Arrays,
    Env,
    Interpreter,
    grids_of,
    has_several_results,
    is_launched,
    talks,
    unrolls,
)
from .positions import expand_ahead
from .regions.cuda.order import InOrder
from .regions.cuda.region import Resident
from .uncompiled import breaks_compile

if TYPE_CHECKING:
    from .regions.cpu.region import NativeRegion


def captured_constants(nodes: Sequence[Node]) -> dict[Value, mx.array]:
    """Evaluated arrays for constants that compiled functions capture.

    They are other arrays over the same buffers: `mx.compile` fails on a call whose argument is the
    very array that the function captures.  Unevaluated ones would be computed at every call.
    """
    arrays = {node.output: mx.stop_gradient(node.args["data"].array) for node in nodes}
    mx.eval(list(arrays.values()))
    return arrays


class LoweredGraph:
    """A lowered graph: steps in order over one environment."""

    def __init__(self, graph: Graph, known: Mapping[Value, mx.array], streams: Streams) -> None:
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        own = [n for n in graph.constants() if n.output not in known]
        self.known = {**known, **captured_constants(own)}
        self.steps: list[Step] = []
        wanted = set(graph.outputs)
        for nodes in reversed(_turns(graph, self.known)):
            if _from_host(nodes[0]):
                self.steps += [from_host(node, self.known, streams) for node in nodes[::-1]]
            else:
                self.steps.append(Stretch.of(nodes, wanted, self.known, streams))
            wanted.update(v for node in nodes for v in node.inputs)
        self.steps.reverse()
        self.dead = self._dead()
        for step, dead in zip(self.steps, self.dead, strict=True):
            if isinstance(step, HostRegion):
                step.last = frozenset(dead)

    def _dead(self) -> list[list[Value]]:
        """For each step what nothing after it reads."""
        last = {v: i for i, step in enumerate(self.steps) for v in step.reads}
        dead: list[list[Value]] = [[] for _ in self.steps]
        for value, i in last.items():
            if value not in self.known and value not in self.outputs:
                dead[i].append(value)
        return dead

    def constants(self) -> Iterator[mx.array]:
        """The arrays that are kept from call to call, in bodies too."""
        yield from self.known.values()
        for step in self.steps:
            if isinstance(step, HostLoop):
                for body, _ in step.bodies:
                    yield from body.constants()

    def __call__(self, inputs: Arrays) -> list[mx.array]:
        return self.take(list(inputs))

    def take(self, inputs: list[mx.array]) -> list[mx.array]:
        """Run on inputs that nobody else holds; empties the list.

        Each value is let go after the last step that reads it, so that MLX can write into its
        buffer: else a cache that a loop carries is copied whenever a kernel waits for it.
        """
        env: Env = dict(zip(self.inputs, inputs, strict=True))
        inputs.clear()
        for step, dead in zip(self.steps, self.dead, strict=True):
            step.run(env)
            for value in dead:
                env.pop(value, None)
        known = self.known
        return [env[v] if v in env else known[v] for v in self.outputs]


def _from_host(node: Node) -> bool:
    if node.op in CONTROL_FLOW:
        return not unrolls(node)
    return (node.op == REGION and not is_launched(node)) or runs_on_host(node.op, node.args)


def _turns(graph: Graph, known: Mapping[Value, mx.array]) -> list[list[Node]]:
    """The nodes that run at each call: compiled ones and ones from the host, turn about.

    Each node in the first turn that it can have: handing over costs tens of microseconds, and the
    host's part of a turn (the products of queries, keys and values) then waits once for its inputs.
    """
    turn: dict[Value, int] = {}
    turns: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "constant" or all(v in known for v in node.outputs):
            continue
        host = int(_from_host(node))  # compiled ones have the even turns, the host the odd ones
        before = (turn[v] for v in node.inputs if v in turn)
        at = max((t + (t % 2 != host) for t in before), default=host)
        turn.update(dict.fromkeys(node.outputs, at))
        turns.setdefault(at, []).append(node)
    return [nodes for _, nodes in sorted(turns.items())]


@dataclass
class Step:
    """Something that reads and adds values of an environment.

    Attributes:
        gives_new: is none of what it adds the very array that it read?
    """

    gives_new: ClassVar[bool] = True

    @property
    def reads(self) -> Sequence[Value]:
        raise NotImplementedError

    def run(self, env: Env) -> None:
        raise NotImplementedError


@dataclass
class Stretch(Step):
    """Nodes without host control, one compiled function."""

    needs: tuple[Value, ...]
    gives: tuple[Value, ...]
    function: Compiled | Uncompiled | InOrder

    @property
    def gives_new(self) -> bool:  # type: ignore[override]
        return not isinstance(self.function, Uncompiled)

    @property
    def reads(self) -> Sequence[Value]:
        return self.needs

    @staticmethod
    def of(
        nodes: Sequence[Node], wanted: set[Value], known: Mapping[Value, mx.array], streams: Streams
    ) -> Stretch:
        made = {v for node in nodes for v in node.outputs}
        read = dict.fromkeys(v for node in nodes for v in node.inputs)
        needs = tuple(v for v in read if v not in made and v not in known)
        gives = tuple(v for node in nodes for v in node.outputs if v in wanted)
        captured = {v: known[v] for v in read if v in known}
        expand_ahead(nodes, streams.device)
        shares = has_several_results(nodes)

        def stretch(*arrays: mx.array) -> list[mx.array]:
            refuse_shapeless()
            return run(arrays, Interpreter(streams, shares=shares, grids=grids))

        def in_order(arrays: list[mx.array], counters: mx.array, last: mx.array) -> list[mx.array]:
            refuse_shapeless()
            interpreter = Interpreter(streams, shares=shares, grids=grids)
            interpreter.order = counters, last
            results = run(arrays, interpreter)
            return [*results, interpreter.order[1]]

        def run(arrays: Arrays, interpreter: Interpreter) -> list[mx.array]:
            env: Env = {value: interpreter.known(array) for value, array in captured.items()}
            env.update(zip(needs, arrays, strict=True))
            for node in nodes:
                interpreter.run(node, env)
            return [env[v] for v in gives]

        on_cpu = streams.device.type == mx.cpu
        grids = grids_of(nodes, streams)
        in_kernels = streams.peers is not None and talks(nodes)  # collectives, as launches
        ordered = any(isinstance(grid, Resident) for grid in grids.values())
        if not on_cpu and (ordered or in_kernels):
            return Stretch(needs, gives, InOrder(in_order))
        if on_cpu and breaks_compile(nodes, captured.values()):
            return Stretch(needs, gives, Uncompiled(stretch))
        return Stretch(needs, gives, Compiled(stretch, [(v.shape, v.dtype) for v in needs]))

    def run(self, env: Env) -> None:
        arrays = self.function.call(*[env[v] for v in self.needs])
        env.update(zip(self.gives, arrays, strict=True))


def _body(
    body: Body, known: Mapping[Value, mx.array], streams: Streams
) -> tuple[LoweredGraph, list[Value]]:
    """A lowered body, and the outer values it takes after its own inputs.

    What is known when the program is built (packed weights above all) is captured, not passed.
    """
    inner = {value: known[source] for value, source in body.shared if source in known}
    passed = [(value, source) for value, source in body.shared if source not in known]
    graph = body.graph.replace(inputs=[*body.own, *(value for value, _ in passed)])
    return LoweredGraph(graph, inner, streams), [source for _, source in passed]


@dataclass
class FromHost(Step):
    """A node that Python carries out, on arrays that it may have to wait for."""

    node: Node
    known: Mapping[Value, mx.array]
    streams: Streams

    def __post_init__(self) -> None:
        self.known = {v: self.known[v] for v in self.node.inputs if v in self.known}

    @property
    def reads(self) -> Sequence[Value]:
        return self.node.inputs

    def look_up(self, env: Env, value: Value) -> mx.array:
        return env[value] if value in env else self.known[value]


class HostLoop(FromHost):
    """A loop or a branch that Python drives, its bodies lowered."""

    gives_new = False  # after no turn at all

    def __post_init__(self) -> None:
        self.bodies = [_body(body, self.known, self.streams) for body in bodies(self.node)]
        super().__post_init__()

    def run(self, env: Env) -> None:
        shared = [[self.look_up(env, v) for v in outer] for _, outer in self.bodies]
        turning = self.node.op in LOOPS
        last = len(self.bodies) - 1

        def run(which: int, own: list[mx.array]) -> list[mx.array]:
            given = [*own, *shared[which]]
            own.clear()  # the body alone holds them now
            results = self.bodies[which][0].take(given)
            if turning and which == last:
                _settle(results)
            return results

        results = carry_out(self.node, lambda v: self.look_up(env, v), run)
        env.update(zip(self.node.outputs, results, strict=True))


def _settle(carried: list[mx.array]) -> None:
    """Compute what a turn gave: else the lazy graph of all turns would pile up.

    MLX holds all of `carried` until what is under way is done, so a turn that begins before copies
    what it would write in place.  On CPUs nothing makes up for that: with a cache of 32 MiB a turn
    took 20 ms, and 0.4 when waited for.  A GPU must be kept busy.
    """
    if mx.default_device() == mx.Device(mx.cpu, 0):
        mx.eval(carried)
    else:
        mx.async_eval(carried)  # type: ignore[no-untyped-call]


class HostKernel(FromHost):
    """A product or an attention by a kernel that runs on the host."""

    product: Callable[..., mx.array] | None = None
    """The node with its packed weight given, where that is known."""

    def __post_init__(self) -> None:
        super().__post_init__()
        args = self.node.args
        if "packed" in args and all(v in self.known for v in args["packed"]):
            packed = [self.known[v] for v in args["packed"]]
            self.product = kernel(args["kernel"]).bind(packed, args["problem"], self.streams)

    def run(self, env: Env) -> None:
        if self.product is not None:
            names = [name for name in ("x", "lhs_indices", "rhs_indices") if self.node.value(name)]
            given = {name: self.look_up(env, self.node.operand(name)) for name in names}
            env[self.node.output] = self.product(**given)
            return
        inputs: Env = {v: self.look_up(env, v) for v in self.node.inputs}
        Interpreter(self.streams).run(self.node, inputs)
        env[self.node.output] = inputs[self.node.output]


class HostRegion(FromHost):
    """A region by its native form."""

    def __init__(
        self, node: Node, known: Mapping[Value, mx.array], streams: Streams, native: NativeRegion
    ) -> None:
        super().__init__(node, known, streams)
        self.native = native
        self.last: frozenset[Value] = frozenset()
        """What nothing after it reads: its caches may be written where they are."""

    def run(self, env: Env) -> None:
        arrays = [self.look_up(env, v) for v in self.native.needs]
        for value in self.last:
            env.pop(value, None)
        try:
            results = self.native.take(arrays)
        except RegionError as error:
            raise QGraphError(
                f"a region did not run: {error}",
                hint="program.profile(...) says what it takes; fewer rows at a time need less",
                origin=self.node.origin,
            ) from None
        env.update(zip(self.node.outputs, results, strict=True))


def from_host(node: Node, known: Mapping[Value, mx.array], streams: Streams) -> FromHost:
    """The step of a node that Python carries out."""
    if node.op == REGION:
        from .regions.run import bound  # only here: most programs, and imports, need none of it

        native = bound(node, known, streams.device)
        if native is not None:
            return HostRegion(node, known, streams, native)
    return (HostLoop if node.bodies else HostKernel)(node, known, streams)
