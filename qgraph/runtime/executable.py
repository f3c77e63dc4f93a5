"""A graph lowered for its input types, its weights packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import mlx.core as mx

from ..analysis.meshes import Part, for_mesh, is_spread, keeping_parts, note_parts
from ..ir.graph import Graph
from ..kernels.compiled import Compiled
from ..kernels.streams import Streams
from ..kernels.tracers import Tracers
from ..rewrite.ledger import collecting
from ..target import Target
from ..tree import LEAF, Tree
from .by_mlx import transformable
from .interpret import Env, Interpreter
from .lower import LoweredGraph, Stretch
from .mesh import watch
from .packing import PackCache, Progress, Release, Staged, pack
from .regions.cuda.order import wait_for_device
from .regions.cuda.peers import connect


class Executable:
    """One specialisation: an optimized graph, packed and lowered for its input types.

    Attributes:
        entries: for the ledger, what lowering decided.
    """

    def __init__(
        self,
        graph: Graph,
        target: Target,
        cache: PackCache,
        *,
        release: Release,
        progress: Progress | None,
        states: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Pack and lower a graph.

        Args:
            graph: optimized for the target.
            states: on a launched mesh, numbers of an input and of the result that it is at the next
                call: where a rank needs but a part of them, it takes and gives that part.
        """
        device = target.device
        self.owner = object()  # of what is prepared: an identity that nothing else has or gets
        self.watch = watch(target.mesh)
        if self.watch is not None:
            self.watch.agree(graph)
        self.parts: dict[int, Part] = {}
        if self.watch is not None:
            graph, self.parts = keeping_parts(graph, states)
            note_parts(graph)
        self.graph = graph = for_mesh(graph, target.mesh)
        self.target = target
        group = peers = None
        if target.mesh is not None:
            group = target.mesh.group
            peers = connect(target.mesh) if is_spread(graph) else None
            if peers is not None and self.watch is not None:
                self.watch.stay(wait_for_device)
        self.streams = Streams(device, group, peers)
        self.on_device = _device_context(device)
        with self.on_device():
            self.known = pack(graph, self.streams, release=release, cache=cache, progress=progress)
        self._prepare = Staged.of(graph, "prepare")
        self._tracers = Tracers()
        self.parameters = [v for v in graph.inputs if v.node.args["parameter"]]
        read = {v for n in graph.nodes if n.stage == "run" for v in n.inputs} | set(graph.outputs)
        kept = [v for v in self.parameters if v in read]
        self.prepared = (
            *kept,
            *sorted(self._prepare.wanted, key=lambda v: (v.node.serial, v.index)),
        )
        self.free = [v for v in graph.inputs if not v.node.args["parameter"]]
        self.body = graph.replace(
            inputs=[*self.prepared, *self.free],
            nodes=[n for n in graph.nodes if n.stage == "run" and n.op != "constant"],
        )
        with collecting() as self.entries:
            self.lowered = LoweredGraph(self.body, self.known, self.streams)
        take = _direct(self.lowered)
        self._take = transformable(take, self.body, self.known, device)
        self._compiled = _single(self.lowered) if self._take is take else None
        self.out_tree = _result_form(graph)
        self._device = device
        self._choice = mx.is_available(mx.Device(mx.gpu))  # else there is one device to ask for
        self._one_result = self.out_tree == LEAF

    def __call__(self, arrays: Sequence[mx.array]) -> Any:
        """Run on prepared parameters and inputs; the results in the form the function gave."""
        if self.watch is not None:
            self.watch.check()
        if self._compiled is None or (self._choice and mx.default_device() != self._device):
            return self.consume(list(arrays))
        results = self._compiled.call(*arrays)
        return results[0] if self._one_result else self.out_tree.build(results)

    @property
    def at_once(self) -> bool:
        """Is a call nothing but one compiled function's, which looks at its types itself?"""
        return self._compiled is not None and self.watch is None

    def in_parts(self, arrays: list[mx.array]) -> list[mx.array]:
        """The arrays as they are taken: of a state that ranks share out this rank's part."""
        mesh = self.target.mesh
        for i, part in self.parts.items():
            assert mesh is not None
            arrays[i] = part.of(arrays[i], mesh)
        return arrays

    def consume(self, arrays: list[mx.array]) -> Any:
        """As a call, on arrays that nobody else holds; empties the list."""
        return self._in_form(self.take(arrays))

    def _in_form(self, results: list[mx.array]) -> Any:
        if self._one_result:
            return results[0]
        return self.out_tree.build(results)

    def run(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """The results in order, on MLX's default device."""
        return self._take(list(arrays))

    def take(self, arrays: list[mx.array]) -> list[mx.array]:
        """The results in order, of arrays that nobody else holds; empties the list.

        MLX writes into their buffers what would else be copies of them.
        """
        if mx.default_device() == self._device:
            return self._take(arrays)
        with mx.stream(self._device):
            return self._take(arrays)

    def split(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Prepared parameters and the other inputs, of arrays for the graph's inputs."""
        given = dict(zip(self.graph.inputs, arrays, strict=True))
        prepared = self.prepare([given[v] for v in self.parameters])
        return [*prepared, *(given[v] for v in self.free)]

    def prepare(self, parameters: Sequence[mx.array]) -> list[mx.array]:
        env: Env = {**self.known, **dict(zip(self.parameters, parameters, strict=True))}
        last_reader = {v: node for node in self._prepare.nodes for v in node.inputs}
        wait = not self._tracers.among(parameters)  # tracers have no elements to wait for
        with self.on_device():
            for node in self._prepare.nodes:
                Interpreter(self.streams).run(node, env)
                if wait:
                    mx.eval([env[v] for v in node.outputs])
                for value in node.inputs:
                    if last_reader[value] is node and value not in self.prepared:
                        env.pop(value, None)
        return [env[v] for v in self.prepared]


def _result_form(graph: Graph) -> Tree:
    """That of a graph; one made by hand gives its one result, or a list of all."""
    if graph.out_tree is not None:
        return graph.out_tree
    leaves = (LEAF,) * len(graph.outputs)
    return LEAF if len(leaves) == 1 else Tree("list", (), leaves)


def _single(lowered: LoweredGraph) -> Compiled | None:
    """The compiled function of a graph that is one stretch in the graph's order, else None."""
    if len(lowered.steps) == 1 and isinstance(lowered.steps[0], Stretch):
        step = lowered.steps[0]
        function, ordered = step.function, step.needs == lowered.inputs
        if isinstance(function, Compiled) and ordered and step.gives == lowered.outputs:
            return function
    return None


def _direct(lowered: LoweredGraph) -> Callable[[list[mx.array]], list[mx.array]]:
    """Run on a list of arrays, which is emptied; skips the environment around a single stretch.

    Otherwise results may be the very arrays that were given, that the program keeps, or one array
    twice.  Whoever writes into a result must not write into those: each gets an array of its own,
    over the same buffer.
    """
    function = _single(lowered)
    if function is not None:

        def at_once(arrays: list[mx.array]) -> list[mx.array]:
            results = function.call(*arrays)
            arrays.clear()
            return results

        return at_once
    if all(step.gives_new for step in lowered.steps):
        given = {*lowered.inputs, *lowered.known}
        again = [i for i, v in enumerate(lowered.outputs) if v in given or v in lowered.outputs[:i]]

        def apart(arrays: list[mx.array]) -> list[mx.array]:
            results = lowered.take(arrays)
            for i in again:
                results[i] = copy(results[i])
            return results

        return apart
    kept = frozenset(map(id, lowered.constants()))

    def run(arrays: list[mx.array]) -> list[mx.array]:
        taken = set(map(id, arrays))  # of arrays that are gone since: a copy more does no harm
        results = lowered.take(arrays)
        for i, array in enumerate(results):
            if id(array) in taken or id(array) in kept:
                results[i] = copy(array)
            taken.add(id(array))
        return results

    return run


def _device_context(device: mx.Device) -> Callable[[], AbstractContextManager[Any]]:
    def context() -> AbstractContextManager[Any]:
        return nullcontext() if mx.default_device() == device else mx.stream(device)

    return context
