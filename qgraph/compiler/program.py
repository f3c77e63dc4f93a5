"""Programs: compiled, callable graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import InputError, QGraphError, TraceError
from ..runtime.executable import Executable
from ..runtime.packing import PackCache, Prepared, Progress, whole
from ..tracing.tensor import Tensor
from ..tree import Tree, flatten
from ..types import type_of
from .plan import Plan

if TYPE_CHECKING:
    from ..inspection.profile import Profile

Key = tuple[Any, ...]


def _plain_form(count: int) -> Tree:
    """The form of a call with `count` arrays and nothing else."""
    return flatten(((mx.array(0),) * count, {}))[1]


def _hand_over(args: tuple[Any, ...], i: int) -> None:
    """Empty the lists and dicts of a donated argument, so that the call alone holds its arrays."""
    if i >= len(args) or isinstance(args[i], mx.array):
        raise InputError(
            f"argument {i} is donated, but a call cannot take an array from its caller",
            hint="give the array in a list, which is empty afterwards",
        )
    pending = [args[i]]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            pending += part.values()
            part.clear()
        elif isinstance(part, list | tuple):
            pending += part
            if isinstance(part, list):
                part.clear()


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
        donate: Sequence[int] = (),
    ) -> None:
        self._specialise = specialise
        self._donate = tuple(donate)
        self.cache = cache or PackCache()
        self._lock = threading.Lock()
        self._executables: dict[Key, Executable] = {}
        # Those that take nothing but arrays, by shapes and dtypes alone: a call must be cheap.
        self._plain: dict[Key, Executable] = {}
        self._progress = progress
        self._last: Executable | None = None
        self._plan: Plan | None = None
        if plan is not None:
            self._add(plan, release)

    def _add(self, plan: Plan, release: bool) -> Executable:
        executable = Executable(
            plan.graph, plan.target, self.cache, release=release, progress=self._progress
        )
        form = plan.graph.in_tree
        key = (form, *((v.shape, v.dtype) for v in plan.graph.inputs))
        self._executables[key] = self._last = executable
        self._plan = plan
        if form is not None and not executable.parameters and form == _plain_form(len(key) - 1):
            self._plain[key[1:]] = executable
        return executable

    @property
    def plan(self) -> Plan:
        """The plan of the specialisation made last."""
        if self._plan is None:
            raise InputError("this program has no plan yet", hint="call it once, then read .plan")
        return self._plan

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
        if not kwargs and not self._donate:
            types = tuple([(a.shape, a.dtype) if type(a) is mx.array else None for a in args])
            plain = self._plain.get(types)
            if plain is not None:
                return plain(args)
        leaves, form = flatten((args, kwargs), static=True)
        key = (form, *[(a.shape, a.dtype) if type(a) is mx.array else type(a) for a in leaves])
        found = self._executables.get(key)
        if found is None:
            return self._call_slowly(args, kwargs)
        given = self._split(found, leaves) if found.parameters else leaves
        if not self._donate:
            return found(given)
        del leaves
        for i in self._donate:
            _hand_over(args, i)
        return found.consume(given)

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
        from ..runtime.measuring import profile

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
        from ..runtime.artefact import save

        return save(self._alone("save", "which are not saved with it"), folder)

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
        from ..runtime.export import export

        return export(self._alone("export", "which are packed before a call"), path)

    def _alone(self, verb: str, parameters: str) -> Executable:
        """The one specialisation, without parameters, that a file can hold."""
        if len(self.executables) != 1:
            raise QGraphError(
                f"the program has {len(self.executables)} specialisations",
                hint=f"{verb} one that qg.compile made for the types it will be called with",
            )
        (executable,) = self.executables
        if executable.parameters:
            raise QGraphError(
                f"the program has parameters, {parameters}",
                hint="compile it with the weights as constants",
            )
        return executable

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
