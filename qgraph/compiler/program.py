"""Programs: compiled, callable graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..errors import InputError, QGraphError
from ..kernels.compiled import OtherTypes
from ..runtime.executable import Executable
from ..runtime.packing import PackCache, Prepared, PreparedOnDemand, Progress, whole
from ..tracing.misuse import checked_positions
from ..tree import Tree, flatten
from .plan import Plan
from .signature import Signature, as_arrays, plain_form

if TYPE_CHECKING:
    from ..inspection.profile import Profile

Key = tuple[Any, ...]


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
        parameters: Sequence[int] = (),
        check: Callable[[], None] | None = None,
    ) -> None:
        self._specialise = specialise
        self._check = check
        self._parameters = tuple(sorted(checked_positions(parameters)))
        self._owner = object()  # of what is prepared for specialisations to come
        self._donate = tuple(sorted(checked_positions(donate, name="donate")))
        self.cache = cache or PackCache()
        self._lock = threading.Lock()
        self._executables: dict[Key, Executable] = {}
        # The same under the sorted form: for calls whose keys come in another order.
        self._by_path: dict[Key, Executable] = {}
        # Those that take nothing but arrays, by shapes and dtypes alone: a call must be cheap.
        self._plain: dict[Key, Executable] = {}
        self._only: Executable | None = None  # of those, if there are no others and it checks types
        self._progress = progress
        self._last: Executable | None = None
        self._plan: Plan | None = None
        if plan is not None:
            self._add(plan, release)

    def _add(self, plan: Plan, release: bool) -> Executable:
        executable = Executable(
            plan.graph, plan.target, self.cache, release=release, progress=self._progress
        )
        signature = Signature.of(plan.graph)
        types = [(v.shape, v.dtype) for v in signature.inputs]
        self._executables[signature.form, *types] = self._last = executable
        self._by_path[_path_key(signature.form, types)] = executable
        self._plan = plan.lowered_as(executable.entries)
        if not executable.parameters and signature.form == plain_form(len(types)):
            self._plain[tuple(types)] = executable
        alone = len(self._executables) == len(self._plain) == 1 and not self._donate
        self._only = executable if alone and executable.at_once else None
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
        if self._check is not None:
            self._check()
        if self._only is not None and not kwargs:
            try:
                return self._only(args)
            except (OtherTypes, ValueError):  # not again: MLX keeps a note of all that it met
                self._only = None
        if not kwargs and not self._donate:
            types = tuple([(a.shape, a.dtype) if type(a) is mx.array else None for a in args])
            plain = self._plain.get(types)
            if plain is not None:
                return plain(args)
        leaves, form = flatten((args, kwargs), static=True)
        key = (form, *[(a.shape, a.dtype) if type(a) is mx.array else type(a) for a in leaves])
        found = self._executables.get(key)
        if found is None:
            found, leaves = self._find(leaves, form, args, kwargs)
        elif found.parameters:
            leaves = found.split(leaves)
        if not self._donate:
            return found(leaves)
        for i in self._donate:
            _hand_over(args, i)
        return found.consume(leaves)

    def _find(
        self, leaves: list[Any], form: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Executable, list[mx.array]]:
        """The specialisation for a call that is not known at once, and the arrays it takes.

        Such are arrays of other libraries, keys in another order, prepared parameters, and types
        not met before.
        """
        if any(isinstance(leaf, Prepared) for leaf in leaves):
            return self._find_prepared(args, kwargs)
        found, arrays = self._specialisation(leaves, form)
        return found, found.split(arrays) if found.parameters else arrays

    def _specialisation(self, leaves: list[Any], form: Tree) -> tuple[Executable, list[mx.array]]:
        """The executable for arguments of this form, and the arrays in the order of its inputs."""
        arrays = as_arrays(leaves)
        key = _path_key(form, [(a.shape, a.dtype) for a in arrays])
        if key not in self._by_path and self._specialise is not None:
            with self._lock:
                if key not in self._by_path:
                    self._add(self._specialise(*form.build(arrays)), release=False)
        found = self._by_path.get(key, self._last)
        assert found is not None
        return found, Signature.of(found.graph).arrange(form, arrays)

    def _find_prepared(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Executable, list[mx.array]]:
        prepared = [a for a in (*args, *kwargs.values()) if isinstance(a, Prepared)]
        first = prepared[0]
        if isinstance(first, PreparedOnDemand) and first.owner is self._owner:
            return self._find_on_demand(first, args, kwargs)
        found = next((e for e in self.executables if e.owner is first.owner), None)
        if found is None or len(prepared) != 1:
            raise InputError(
                "prepared parameters of another program were given",
                hint="call .prepare of this program and pass its one result",
            )
        leaves, form = flatten(
            (
                tuple(a for a in args if not isinstance(a, Prepared)),
                {n: a for n, a in kwargs.items() if not isinstance(a, Prepared)},
            ),
            static=True,
        )
        free = Signature.of(found.graph).halves()[1].arrange(form, as_arrays(leaves))
        return found, [*first.arrays, *free]

    def _find_on_demand(
        self, prepared: PreparedOnDemand, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Executable, list[mx.array]]:
        """With the parameters put back in their places, whose types choose the specialisation."""
        whole = [a for a in args if a is not prepared]
        for place, argument in zip(self._parameters, prepared.arguments, strict=True):
            whole.insert(place, argument)
        named = {n: a for n, a in kwargs.items() if a is not prepared}
        leaves, form = flatten((tuple(whole), named), static=True)
        found, arrays = self._specialisation(leaves, form)
        given = dict(zip(found.graph.inputs, arrays, strict=True))
        packed = prepared.packed(
            found.owner, lambda: found.prepare([given[v] for v in found.parameters])
        )
        return found, [*packed.arrays, *(given[v] for v in found.free)]

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
        return profile(*self._find(leaves, form, args, kwargs), repeats=repeats)

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

    def prepare(self, *parameters: Any, **keywords: Any) -> Prepared:
        """Pack parameters once; pass the result in place of all of them.

        The result of a program made by `jit` fits all input types, also before its first call: it
        is packed when types are met, and the parameters are kept for those to come.

        Args:
            parameters, keywords: the arguments that were declared parameters, in order.

        Raises:
            InputError: they are not those that were declared; names the path.

        >>> import mlx.core as mx, qgraph as qg
        >>> f = lambda w, x: qg.quantized_matmul(x, w)
        >>> program = qg.compile(f, qg.spec((64, 64)), qg.spec((1, 64)), parameters=[0])
        >>> packed = program.prepare(mx.ones((64, 64)))
        >>> program(packed, mx.ones((1, 64))).shape
        (1, 64)
        """
        if self._specialise is not None and self._parameters:
            return self._prepare_on_demand(parameters, keywords)
        if self._last is None or not self._last.parameters:
            raise InputError("this program has no parameters", hint="compile with parameters=[…]")
        executable = self._last
        leaves, form = flatten((parameters, keywords), static=True)
        wanted = Signature.of(executable.graph).halves()[0]
        arrays = replace(wanted, name="prepare").arrange(form, as_arrays(leaves))
        return Prepared(executable.prepare(arrays), executable.owner)

    def _prepare_on_demand(
        self, parameters: tuple[Any, ...], keywords: dict[str, Any]
    ) -> PreparedOnDemand:
        wanted = len(self._parameters)
        if len(parameters) != wanted or keywords:
            given = ", ".join([str(len(parameters)), *keywords])
            raise InputError(
                f"prepare: it takes the {wanted} positional arguments {list(self._parameters)} of "
                f"the function, got {given}",
                hint="give each argument that was declared a parameter, in order",
            )
        leaves, form = flatten(parameters, static=True)
        arrays = as_arrays(leaves)
        return PreparedOnDemand(form.build(arrays), arrays, self._owner)


def _path_key(form: Tree, types: Sequence[Any]) -> Key:
    """The same for calls that differ in the order of keys alone."""
    ordered = form.sorted()
    return ordered, *(types[place] for place in ordered.places(form))
