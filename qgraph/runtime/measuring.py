"""Measuring a program: its nodes, its stretches and the whole, in rounds.

Nodes are timed one by one on real inputs, in rounds, so that a drift of the machine hits all of
them alike.  What `mx.compile` fuses runs faster together than the sum of its nodes: the compiled
stretches and the whole call are timed in the same rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..analysis.estimate import estimate, in_bytes
from ..analysis.problems import product_estimate
from ..inspection.profile import NodeTime, Profile, StretchTime
from ..ir.graph import Graph, Node, Value, reachable
from ..ir.kinds import VIEWS
from ..ir.loops import CONTROL_FLOW, REGION, bodies, runs, turns
from ..kernels.streams import Streams
from ..target import Target
from ..timing import once
from .interpret import Env, Interpreter
from .lower import FromHost, HostRegion, LoweredGraph, Step, Stretch
from .regions.measuring import Clock, InPhase
from .regions.run import bound

if TYPE_CHECKING:
    from .executable import Executable

_LONG_ENOUGH = 2e-4
"""Shorter nodes run several times in one timing, so that starting one is not what is timed."""

_COPIES = 16


def copy_timer(target: Target, nbytes: int = 2**26) -> Callable[[], float]:
    """A function that times one large copy: bytes read and written, a second.

    On a CPU it is NumPy's copy of host memory, on a GPU one elementwise kernel.
    """
    if target.is_cpu:
        source = np.ones(nbytes, np.uint8)
        goal = np.empty_like(source)
        return lambda: 2 * nbytes / once(lambda: np.copyto(goal, source))
    array = mx.ones(nbytes, mx.float32)
    mx.eval(array)
    return lambda: 2 * array.nbytes / once(lambda: mx.eval(mx.negative(array)))


@dataclass(slots=True)
class _Timed:
    """Something to time in each round."""

    node: Node
    times: int
    run: Callable[[], list[mx.array]]
    copies: int = 1

    def seconds(self) -> float:
        return once(lambda: mx.eval([self.run() for _ in range(self.copies)])) / self.copies


def profile(executable: Executable, arrays: Sequence[mx.array], *, repeats: int = 5) -> Profile:
    """Measure a program's specialisation on prepared parameters and inputs, in that order."""
    with executable.on_device():
        mx.eval(list(arrays))
        timed = list(_nodes(executable, arrays))
        for each in timed:
            each.seconds()
            each.copies = min(_COPIES, max(1, math.ceil(_LONG_ENOUGH / each.seconds())))
        steps = list(_steps(executable, arrays))
        copy = copy_timer(executable.target)
        copy(), _whole(executable, arrays)  # warm-up
        copies: list[float] = []
        wholes: list[float] = []
        rounds: list[list[float]] = [[] for _ in timed]
        stretch_rounds: list[list[float]] = [[] for _ in steps]
        for _ in range(repeats):
            copies.append(copy())
            wholes.append(_whole(executable, arrays))
            for (_, run), seconds in zip(steps, stretch_rounds, strict=True):
                seconds.append(run())
            for each, seconds in zip(timed, rounds, strict=True):
                seconds.append(each.seconds())
    bandwidth = statistics.median(copies)
    target = executable.target
    rows = [
        _row(each, statistics.median(seconds), bandwidth, target)
        for each, seconds in zip(timed, rounds, strict=True)
    ]
    stretches = tuple(
        StretchTime(label, nodes, statistics.median(seconds))
        for ((label, nodes), _), seconds in zip(steps, stretch_rounds, strict=True)
    )
    rows.sort(key=lambda row: -row.seconds)
    whole = statistics.median(wholes)
    phases = tuple(
        clock.phases()
        for clock in dict.fromkeys(each.clock for each in timed if isinstance(each, InPhase))
    )
    return Profile(
        executable.graph,
        target,
        tuple(rows),
        stretches,
        whole,
        bandwidth,
        tuple(p for found in phases for p in found),
    )


def _row(timed: _Timed | InPhase, seconds: float, bandwidth: float, target: Target) -> NodeTime:
    cost = estimate(timed.node).times(timed.times)
    known = product_estimate(timed.node, target)
    guess = cost.nbytes / bandwidth if known is None else known * timed.times
    return NodeTime(timed.node, seconds * timed.times, timed.times, cost, guess)


def _whole(executable: Executable, arrays: Sequence[mx.array]) -> float:
    return once(lambda: mx.eval(executable.run(arrays)))


def _steps(
    executable: Executable, arrays: Sequence[mx.array]
) -> Iterator[tuple[tuple[str, tuple[Node, ...]], Callable[[], float]]]:
    """The compiled stretches and host loops of a program, each with a function that times it."""
    nodes = [n for n in executable.graph.nodes if n.stage == "run" and n.op != "constant"]
    lowered = executable.lowered
    if [type(step) for step in lowered.steps] == [Stretch]:
        yield ("compiled together", tuple(nodes)), lambda: _whole(executable, arrays)
        return
    env: Env = dict(zip(lowered.inputs, arrays, strict=True))
    made = {v: n for n in nodes for v in n.outputs}
    for step in lowered.steps:
        outputs = _outputs(step)
        before = dict(env)
        step.run(env)
        mx.eval([env[v] for v in outputs])
        yield (_label(step, made), _held(step, nodes, outputs)), _timer(step, before, outputs)


def _outputs(step: Step) -> tuple[Value, ...]:
    if isinstance(step, Stretch):
        return step.gives
    assert isinstance(step, FromHost)
    return step.node.outputs


def _label(step: Step, made: dict[Value, Node]) -> str:
    if isinstance(step, HostRegion):
        memory = step.native.memory
        return (
            f"region of {len(step.native.phases())} phases in {in_bytes(memory.nbytes)}, "
            f"largest cut {in_bytes(memory.cut)}"
        )
    if isinstance(step, FromHost):
        return f"{step.node.op} from the host"
    return "compiled together"


def _held(step: Step, nodes: Sequence[Node], outputs: Sequence[Value]) -> tuple[Node, ...]:
    """The nodes of a step: the loop, or what its results need that the step does not get."""
    if isinstance(step, FromHost):
        return (step.node,)
    assert isinstance(step, Stretch)
    inside = set(reachable(outputs, step.needs)) - {v.node for v in step.needs}
    return tuple(n for n in nodes if n in inside)


def _timer(step: Step, before: Env, outputs: Sequence[Value]) -> Callable[[], float]:
    def run() -> float:
        env = dict(before)

        def work() -> None:
            step.run(env)
            mx.eval([env[v] for v in outputs])

        return once(work)

    return run


def _nodes(executable: Executable, arrays: Sequence[mx.array]) -> Iterator[_Timed | InPhase]:
    streams = executable.streams
    order = [*executable.prepared, *executable.free]
    env: Env = {**executable.known, **dict(zip(order, arrays, strict=True))}
    run = [n for n in executable.graph.nodes if n.stage == "run"]
    yield from _timed(run, env, streams, 1)


def _timed(
    nodes: Sequence[Node], env: Env, streams: Streams, times: int
) -> Iterator[_Timed | InPhase]:
    """Run `nodes` once, adding to `env`; give each one's timer, of bodies at their first turn."""
    for node in nodes:
        if node.op == REGION and (native := bound(node, {}, streams.device)) is not None:
            arrays = [env[v] for v in native.needs]
            env.update(zip(node.outputs, native(arrays), strict=True))
            yield from Clock(node, native, arrays).timers(times)
        elif node.op in CONTROL_FLOW or node.op == REGION:
            yield from _control_flow(node, env, streams, times)
            continue
        if all(v in env for v in node.outputs):
            continue
        if node.op == "constant" and node.args["data"].is_released:
            continue  # only the pack step read it
        Interpreter(streams).run(node, env)
        mx.eval([env[v] for v in node.outputs])
        if node.op != "constant" and node.op not in VIEWS:
            yield _Timed(node, times, _runner(node, env, streams))


def _runner(node: Node, env: Env, streams: Streams) -> Callable[[], list[mx.array]]:
    inputs = {v: env[v] for v in node.inputs}

    def run() -> list[mx.array]:
        local = dict(inputs)
        Interpreter(streams).run(node, local)
        return [local[v] for v in node.outputs]

    return run


def _control_flow(node: Node, env: Env, streams: Streams, times: int) -> Iterator[_Timed | InPhase]:
    step = LoweredGraph(_alone(node), {}, streams)
    results = step([env[v] for v in dict.fromkeys(node.inputs)])
    mx.eval(results)
    env.update(zip(node.outputs, results, strict=True))
    count, first = _turned(node, env, streams)
    for i, own in first.items():
        body = bodies(node)[i]
        local: Env = dict(zip(body.own, own, strict=True))
        local.update((inner, env[outer]) for inner, outer in body.shared)
        mx.eval(list(local.values()))
        yield from _timed(body.graph.nodes, local, streams, times * count)


def _alone(node: Node) -> Graph:
    """A graph of one node over its own operands."""
    return Graph(node.op, tuple(dict.fromkeys(node.inputs)), [node], node.outputs)


def _turned(node: Node, env: Env, streams: Streams) -> tuple[int, dict[int, list[mx.array]]]:
    """How often a loop turns on these inputs, and what each body that runs gets at first."""
    known, first, count = turns(node), dict[int, list[mx.array]](), 0
    lowered = [LoweredGraph(body, {}, streams) for body in node.bodies]
    shared = [[env[outer] for _, outer in body.shared] for body in bodies(node)]
    steps = runs(node, env.__getitem__)
    try:
        which, own = next(steps)
        while True:
            first.setdefault(which, own)
            count += which == len(node.bodies) - 1
            if known is not None:
                return known, first
            which, own = steps.send(lowered[which]([*own, *shared[which]]))
    except StopIteration:
        return (1 if node.op == "cond" else count), first
