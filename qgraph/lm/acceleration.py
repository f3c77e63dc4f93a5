"""What stands behind an accelerated model: its programs, and what runs without one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import mlx.core as mx

from ..errors import QGraphError
from ..importer import from_mlx
from ..runtime.packing import PackCache
from ..compiler.pipeline import Tune, optimize
from ..runtime.executable import Executable
from ..quantization.config import Quantize
from ..target import Target
from ..tracing.trace import sharing
from .call import Call, Step
from .compare import Difference, compared
from .kind import Kind
from .kinds import kind_of
from .numbers import Numbers, Pool
from .overrides import overrides_of, standing_in
from .pieces import pieces
from .report import Report
from .weights import Watch


class Program:
    """One program of a model, for the types of a call."""

    def __init__(self, executable: Executable | None, reason: str = "") -> None:
        self.executable, self.reason = executable, reason
        self.checked = False
        self.differences: list[Difference] = []


class Acceleration:
    """The programs of one model; `model.qgraph`.

    Args:
        own: the call of the model's class, which runs without programs.
        target, quantize, tune: as for `qg.optimize`.
    """

    def __init__(
        self,
        own: Callable[..., Any],
        target: Target,
        quantize: Quantize | None = None,
        tune: Tune = "table",
    ) -> None:
        self._own = own
        self._target, self._quantize, self._tune = target, quantize, tune
        self._lock = threading.RLock()
        self._said = Report()
        self._watch: Watch | None = None
        self._reset()

    def _reset(self) -> None:
        self._programs: dict[Any, Program] = {}
        self._packed = PackCache()
        self._shapes: dict[int, Any] = {}
        self._numbers = Numbers()

    def report(self) -> str:
        """Programs, what ran eagerly and why, and memory."""
        return self._said.text(self._programs.values(), self._packed)

    def __call__(
        self, model: Any, tokens: mx.array, cache: Sequence[Any] | None, extras: Mapping[str, Any]
    ) -> Any:
        """The model's call, through a program where there can be one."""
        kinds = [] if cache is None else [kind_of(c) for c in cache]
        why = _refusal(tokens, cache, kinds, extras) or self._said.never
        if why:
            return self._eagerly(model, tokens, cache, extras, why)
        with self._lock:
            if self._watch is None or not self._watch.unchanged():
                if self._watch is not None:
                    self._said.note("weights changed: programs are made again")
                self._watch = Watch(model)
                self._reset()
        results = []
        for start, valid, count in pieces(tokens.shape[1], all(k.pads for k in kinds)):
            piece = tokens[:, start : start + valid].astype(mx.int32)
            results.append(self._piece(model, piece, count, cache, kinds, extras))
        return results[0] if len(results) == 1 else mx.concatenate(results, axis=1)

    def _eagerly(
        self, model: Any, tokens: Any, cache: Any, extras: Mapping[str, Any], why: str
    ) -> Any:
        self._said.eager(why)
        return self._own(model, tokens, cache=cache, **extras)

    def _piece(
        self, model: Any, tokens: mx.array, count: int, cache: Any, kinds: Any, extras: Any
    ) -> Any:
        """A call of `count` tokens a row, of which `tokens` are those that count."""
        rows, valid = tokens.shape
        why = next(filter(None, (k.refuses(c, count) for k, c in zip(kinds, cache, strict=True))), "")
        if why:
            return self._eagerly(model, tokens, cache, extras, why)
        fresh = count > 1 and all(k.is_empty(c) for k, c in zip(kinds, cache, strict=True))
        expected = None
        if not self._shapes:
            after = copy.deepcopy(cache)
            logits = self._own(model, tokens, cache=after, **extras)
            expected = (logits, after)
            self._shapes = {
                i: k.shapes(c) for i, (k, c) in enumerate(zip(kinds, after, strict=True))
            }
        for i, (kind, c) in enumerate(zip(kinds, cache, strict=True)):
            kind.make_room(c, self._shapes[i], rows, count)
        fixed = tuple((k, k.fixed(c, count)) for k, c in zip(kinds, cache, strict=True))
        pool = self._numbers.pool(kinds, cache)
        arrays = [k.arrays(c) for k, c in zip(kinds, cache, strict=True)]
        flat = [a for some in arrays for a in some]
        key = (
            rows, count, fresh, fixed, pool.places,
            *((a.shape, a.dtype) for a in (*pool.values, *flat)),
        )  # fmt: skip
        padded = mx.pad(tokens, ((0, 0), (0, count - valid))) if count > valid else tokens
        given = [padded, mx.array(valid, mx.int32), *pool.values]
        with self._lock:
            program = self._programs.get(key)
            if program is None:
                program = self._make(model, key, given, pool, arrays, fixed, fresh)
                self._programs[key] = program
        if program.executable is None:
            return self._eagerly(model, tokens, cache, extras, program.reason)
        if not program.checked and expected is None:
            after = copy.deepcopy(cache)
            expected = (self._own(model, tokens, cache=after, **extras), after)
        step = Step(valid, count, pool.leaders)
        logits, *results = program.executable.take([*given, *flat])
        at = 0
        for kind, c, some in zip(kinds, cache, arrays, strict=True):
            kind.put(c, results[at : at + len(some)], step)
            at += len(some)
        self._numbers.follow(kinds, cache)
        logits = logits[:, :valid] if count > valid else logits
        if program.checked:
            return logits
        return self._checked(program, kinds, cache, logits, *expected)

    def _checked(
        self, program: Program, kinds: Any, cache: Any, logits: Any, expected: Any, after: Any
    ) -> Any:
        """The logits, once they are the model's own; else the model's, and its caches."""
        difference = compared(kinds, cache, logits, after, expected)
        if difference is None:
            program.checked = True
            return logits
        program.differences.append(difference)
        if difference.final or len(program.differences) == 3:
            program.executable, program.reason = None, str(difference)
        for c, right in zip(cache, after, strict=True):
            vars(c).update(vars(right))
        return expected

    def _make(
        self, model: Any, key: Any, given: Any, pool: Pool, arrays: Any, fixed: Any, fresh: bool
    ) -> Program:
        found = overrides_of(model)
        own = self._own
        rank = max([o.rank for _, o in found], default=2)
        additive = any(o.additive for _, o in found)

        def step(model: Any, tokens: Any, valid: Any, numbers: Any, arrays: Any) -> Any:
            call = Call(tokens.shape[1], valid, fresh, rank, additive)
            views = [
                kind.view(form, [numbers[i] for i in where], some, call)
                for (kind, form), where, some in zip(fixed, pool.places, arrays, strict=True)
            ]
            with standing_in(found, call, views):
                logits = own(model, tokens, cache=views)
            return logits, [k.results(v) for (k, _), v in zip(fixed, views, strict=True)]

        try:
            with sharing(self._packed.constants):
                graph = from_mlx(
                    MethodType(step, model), given[0], given[1], given[2:], arrays,
                    name=f"{type(model).__name__}",
                )  # fmt: skip
            plan = optimize(
                graph, target=self._target, quantize=self._quantize, tune=self._tune, check=False
            )
            return Program(Executable(plan, self._packed, release=False, progress=None))
        except Exception as error:
            words = error.what if isinstance(error, QGraphError) else f"{type(error).__name__}: {error}"
            return Program(None, words)


def _refusal(
    tokens: Any, cache: Any, kinds: Sequence[Kind | None], extras: Mapping[str, Any]
) -> str:
    """Why a call cannot go through a program, or nothing."""
    if cache is None:
        return "a call without a cache"
    if not isinstance(tokens, mx.array) or tokens.ndim != 2 or not tokens.size:
        return "tokens that are no array of rows"
    if not mx.issubdtype(tokens.dtype, mx.integer):
        return f"tokens of {tokens.dtype}"
    unknown = {type(c).__name__ for k, c in zip(kinds, cache, strict=True) if k is None}
    if unknown:
        return f"a cache of its own kind: {', '.join(sorted(unknown))}"
    given = sorted(name for name, thing in extras.items() if thing is not None)
    return f"arguments besides tokens and cache: {', '.join(given)}" if given else ""
