"""Programs: compiled, callable graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .errors import InputError, TraceError
from .interpret import Env, Interpreter, Streams
from .ir import Graph, reachable
from .lower import LoweredGraph, Stretch
from .packing import PackCache, Prepared, Progress, Staged, pack, whole
from .plan import Plan
from .target import Target, as_target
from .tensor import Tensor
from .tree import Tree, flatten
from .types import type_of

if TYPE_CHECKING:
    from .profile import Profile

Key = tuple[Any, ...]


class Executable:
    """One specialisation: a plan lowered for its input types."""

    def __init__(
        self, plan: Plan, cache: PackCache, *, release: bool, progress: Progress | None
    ) -> None:
        graph, device = plan.graph, plan.target.device
        self.plan = plan
        self.graph = graph
        self.streams = Streams(device)
        self.on_device = _device_context(device)
        with self.on_device():
            self.known = pack(graph, self.streams, release=release, cache=cache, progress=progress)
        self._prepare = Staged.of(graph, "prepare")
        self.parameters = [v for v in graph.inputs if v.node.args["parameter"]]
        read = {v for n in graph.nodes if n.stage == "run" for v in n.inputs} | set(graph.outputs)
        kept = [v for v in self.parameters if v in read]
        self.prepared = (
            *kept,
            *sorted(self._prepare.wanted, key=lambda v: (v.node.serial, v.index)),
        )
        self.free = [v for v in graph.inputs if not v.node.args["parameter"]]
        body = graph.replace(
            inputs=[*self.prepared, *self.free],
            nodes=[n for n in graph.nodes if n.stage == "run" and n.op != "constant"],
        )
        self.lowered = LoweredGraph(body, self.known, self.streams)
        self.run = _direct(self.lowered)
        self.out_tree = graph.out_tree
        self._device = device
        self._one_result = graph.out_tree is None or graph.out_tree.kind == "leaf"

    def __call__(self, arrays: Sequence[mx.array]) -> Any:
        """Run on prepared parameters and inputs; the results in the form the function gave."""
        if mx.default_device() == self._device:
            results = self.run(arrays)
        else:
            with mx.stream(self._device):
                results = self.run(arrays)
        if self._one_result:
            return results[0]
        assert self.out_tree is not None
        return self.out_tree.build(results)

    def prepare(self, parameters: Sequence[mx.array]) -> list[mx.array]:
        env: Env = {**self.known, **dict(zip(self.parameters, parameters, strict=True))}
        last_reader = {v: node for node in self._prepare.nodes for v in node.inputs}
        with self.on_device():
            for node in self._prepare.nodes:
                Interpreter(self.streams).run(node, env)
                mx.eval([env[v] for v in node.outputs])
                for value in node.inputs:
                    if last_reader[value] is node and value not in self.prepared:
                        env.pop(value, None)
        return [env[v] for v in self.prepared]


def _direct(lowered: LoweredGraph) -> Callable[[Sequence[mx.array]], list[mx.array]]:
    """Skip the environment where all there is is one compiled stretch in the graph's order.

    Otherwise results may be the very arrays that were given, that the program keeps, or one array
    twice.  Whoever writes into a result must not write into those: each gets an array of its own,
    over the same buffer.
    """
    if len(lowered.steps) == 1 and isinstance(lowered.steps[0], Stretch):
        step = lowered.steps[0]
        if step.needs == lowered.inputs and step.gives == lowered.outputs:
            function = step.function
            return lambda arrays: function.call(*arrays)
    kept = frozenset(map(id, lowered.constants()))

    def run(arrays: Sequence[mx.array]) -> list[mx.array]:
        taken = set(map(id, arrays))
        results = lowered(arrays)
        for i, array in enumerate(results):
            if id(array) in taken or id(array) in kept:
                results[i] = mx.stop_gradient(array)
            taken.add(id(array))
        return results

    return run


def _device_context(device: mx.Device) -> Callable[[], AbstractContextManager[Any]]:
    def context() -> AbstractContextManager[Any]:
        return nullcontext() if mx.default_device() == device else mx.stream(device)

    return context


def _plain_form(count: int) -> Tree:
    """The form of a call with `count` arrays and nothing else."""
    return flatten(((mx.array(0),) * count, {}))[1]


class Program:
    """A compiled function of arrays; made by `qgraph.compile` and `qgraph.jit`.

    Call it with trees of arrays as the function was traced with.  It may be called from any
    thread.  All its specialisations share one packed copy of the weights.
    """

    def __init__(
        self,
        specialise: Callable[[tuple[Any, ...], dict[str, Any]], Plan] | None,
        plan: Plan | None = None,
        *,
        release: bool = False,
        progress: Progress | None = None,
        cache: PackCache | None = None,
    ) -> None:
        self._specialise = specialise
        self.cache = cache or PackCache()
        self._lock = threading.Lock()
        self._executables: dict[Key, Executable] = {}
        # Those that take nothing but arrays, by shapes and dtypes alone: a call must be cheap.
        self._plain: dict[Key, Executable] = {}
        self._progress = progress
        self._last: Executable | None = None
        if plan is not None:
            self._add(plan, release)

    def _add(self, plan: Plan, release: bool) -> Executable:
        executable = Executable(plan, self.cache, release=release, progress=self._progress)
        form = plan.graph.in_tree
        key = (form, *((v.shape, v.dtype) for v in plan.graph.inputs))
        self._executables[key] = self._last = executable
        if form is not None and not executable.parameters and form == _plain_form(len(key) - 1):
            self._plain[key[1:]] = executable
        return executable

    @property
    def plan(self) -> Plan:
        """The plan of the specialisation made last."""
        if self._last is None:
            raise InputError("this program has no plan yet", hint="call it once, then read .plan")
        return self._last.plan

    @property
    def executables(self) -> list[Executable]:
        """Every specialisation, in the order they were made."""
        return list(self._executables.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights and other constants that the program keeps.

        Rows sliced off a weight are views of it, which hold all of it.
        """
        found = {}
        for executable in self.executables:
            keys = self.cache.keys(executable.graph)
            for value in executable.known:
                held = whole(value)
                found[keys[held.node], held.index] = held.type.nbytes
        return sum(found.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; returns what the traced function returned, as arrays.

        Raises:
            InputError: the arguments are not those it was compiled for.
        """
        if not kwargs:
            types = tuple([(a.shape, a.dtype) if type(a) is mx.array else None for a in args])
            plain = self._plain.get(types)
            if plain is not None:
                return plain(args)
        leaves, form = flatten((args, kwargs), static=True)
        key = (form, *[(a.shape, a.dtype) if type(a) is mx.array else type(a) for a in leaves])
        found = self._executables.get(key)
        if found is None:
            return self._call_slowly(args, kwargs)
        return found(self._split(found, leaves) if found.parameters else leaves)

    def _split(self, executable: Executable, leaves: list[mx.array]) -> list[mx.array]:
        given = dict(zip(executable.graph.inputs, leaves, strict=True))
        prepared = executable.prepare([given[v] for v in executable.parameters])
        return [*prepared, *(given[v] for v in executable.free)]

    def _call_slowly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arrays of other libraries, prepared parameters, and types not met before."""
        if any(isinstance(a, Prepared) for a in args):
            return self._call_prepared(args, kwargs)
        leaves, form = flatten((args, kwargs), static=True)
        if any(isinstance(a, np.ndarray | np.generic) for a in leaves):
            arrays = [
                mx.array(np.asarray(a)) if isinstance(a, np.ndarray | np.generic) else a
                for a in leaves
            ]
            args, kwargs = form.build(arrays)
            return self(*args, **kwargs)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                raise TraceError(
                    "a program was called on a symbolic tensor",
                    hint="programs take arrays; inside a trace call the function itself",
                )
            if not isinstance(leaf, mx.array):
                raise InputError(
                    f"a program takes arrays, not {type(leaf).__name__}", hint="pass mx.array(...)"
                )
        if self._specialise is None:
            raise InputError(*self._mismatch(leaves, form))
        with self._lock:
            key = (form, *((a.shape, a.dtype) for a in leaves))
            if key not in self._executables:
                self._add(self._specialise(args, kwargs), release=False)
        return self(*args, **kwargs)

    def _mismatch(self, leaves: list[mx.array], form: Tree) -> tuple[str]:
        assert self._last is not None
        graph = self._last.graph
        if form != graph.in_tree:
            return (
                f"{graph.name}: {len(leaves)} arrays were given in another form than the "
                f"{len(graph.inputs)} it was compiled for",
            )
        wrong = [
            f"{v.node.args['name']} is {type_of(a)}, not {v.type}"
            for v, a in zip(graph.inputs, leaves, strict=True)
            if v.type != type_of(a)
        ]
        return (
            f"{graph.name} was compiled for other types: {'; '.join(wrong)}. "
            "Compile it for these too, or use qg.jit, which compiles per input types",
        )

    def profile(self, *args: Any, repeats: int = 5, **kwargs: Any) -> Profile:
        """Time the program node by node and as it runs; print the result.

        Args:
            args, kwargs: as for a call.
            repeats: timed rounds; medians are given.

        >>> import mlx.core as mx, qgraph as qg
        >>> program = qg.compile(lambda x: qg.tanh(x @ x), qg.spec((64, 64)))
        >>> measured = program.profile(mx.ones((64, 64)), repeats=1)
        >>> sorted(row.node.op for row in measured.rows)
        ['matmul', 'tanh']
        """
        from .measuring import profile

        mx.eval(self(*args, **kwargs))  # compiles for these types
        leaves, form = flatten((args, kwargs), static=True)
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in leaves]
        found = self._executables[(form, *((a.shape, a.dtype) for a in arrays))]
        given = self._split(found, arrays) if found.parameters else arrays
        return profile(found, given, repeats=repeats)

    def save(self, folder: str | Path) -> Path:
        """Write the program with its packed weights to a folder; `qg.load` reads it.

        Raises:
            QGraphError: it has parameters, or several specialisations.
        """
        from .artefact import save_program

        return save_program(self, folder)

    def export(self, path: str | Path) -> Path:
        """Write the program to a `.mlxfn` file, which MLX runs without qgraph.

        `mx.import_function(path)` takes the arrays of a call in order, without their tree, and
        returns the results as a list.  The packed weights are in the file.

        Raises:
            QGraphError: it has parameters or several specialisations, runs something from the host
                (a long loop, a `while_loop`, a kernel that calls a library), or holds an op that
                MLX cannot write.

        >>> import os, tempfile, mlx.core as mx, qgraph as qg
        >>> program = qg.compile(lambda x: qg.exp(x) + 1, qg.spec((4,)))
        >>> path = program.export(os.path.join(tempfile.mkdtemp(), "f.mlxfn"))
        >>> mx.import_function(str(path))(mx.zeros(4))[0].tolist()
        [2.0, 2.0, 2.0, 2.0]
        """
        from .export import export_program

        return export_program(self, path)

    def prepare(self, *parameters: Any) -> Prepared:
        """Pack parameters once; pass the result in place of all of them.

        Args:
            parameters: the arguments that were declared parameters, in order.

        >>> import mlx.core as mx, qgraph as qg
        >>> f = lambda w, x: qg.quantized_matmul(x, w)
        >>> program = qg.compile(f, qg.spec((64, 64)), qg.spec((1, 64)), parameters=[0])
        >>> packed = program.prepare(mx.ones((64, 64)))
        >>> program(packed, mx.ones((1, 64))).shape
        (1, 64)
        """
        if self._last is None or not self._last.parameters:
            raise InputError("this program has no parameters", hint="compile with parameters=[…]")
        executable = self._last
        leaves, _ = flatten(parameters, static=True)
        types = [type_of(a) for a in leaves]
        wanted = [v.type for v in executable.parameters]
        if types != wanted:
            raise InputError(f"prepare: got {types}", hint=f"the parameters are {wanted}")
        return Prepared(executable.prepare(leaves), id(executable))

    def _call_prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prepared = [a for a in args if isinstance(a, Prepared)]
        found = next((e for e in self.executables if id(e) == prepared[0].owner), None)
        if found is None or len(prepared) != 1:
            raise InputError(
                "prepared parameters of another program were given",
                hint="call .prepare of this program and pass its one result",
            )
        rest = [a for a in args if not isinstance(a, Prepared)]
        leaves, _ = flatten((rest, kwargs), static=True)
        types, wanted = [type_of(mx.array(a)) for a in leaves], [v.type for v in found.free]
        if types != wanted:
            raise InputError(f"{found.graph.name}: got {types}", hint=f"it takes {wanted}")
        return found([*prepared[0].arrays, *leaves])


def evaluate(tensor: Tensor, target: Target | None = None) -> mx.array:
    """Compile and run the expression behind a lazy tensor."""
    from .pipeline import optimize

    nodes = reachable([tensor.value])
    for node in nodes:
        if node.op == "input":
            raise TraceError(
                f"this tensor depends on {node.args['name'] or 'an argument'}, whose elements "
                "are not known while tracing",
                hint="return it from the traced function and call the program",
            )
    nodes.sort(key=lambda node: node.serial)
    graph = Graph("expression", [], nodes, [tensor.value])
    plan = optimize(graph, target=target or as_target())
    executable = Executable(plan, PackCache(), release=False, progress=None)
    with executable.on_device():
        result = executable.run([])[0]
        mx.eval(result)
    return result
