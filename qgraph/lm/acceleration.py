"""What stands behind an accelerated model: its programs, and what runs without one."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..runtime.executable import Executable
from ..runtime.packing import PackCache
from .background import Library
from .call import Step
from .check import Check
from .kind import Kind
from .kinds import kind_of
from .numbers import Numbers
from .overrides import overrides_of
from .pieces import sizes_for
from .programs import Form, Maker, Program, types_of
from .report import Report
from .weights import Watch

AHEAD = 64
"""So many tokens before a buffer is full the program for the next one is begun."""


class Acceleration:
    """The programs of one model, which `model.qgraph` is.

    Attributes:
        programs: those that were made.
        eager: how often what ran without a program, by the reason.
    """

    def __init__(self, model: Any, maker: Maker) -> None:
        self._model = model
        self._maker = maker
        self._sizes = sizes_for(maker.target)
        self._lock = threading.RLock()
        self._said = Report()
        self._check = Check(maker.own, maker.target)
        self._watch: Watch | None = None
        self._forget()

    def _forget(self) -> None:
        packed = self._packed = PackCache()
        model = self._model
        self._library = Library(lambda form: self._maker.make(model, form, packed))
        self._shapes: list[Any] | None = None
        self._numbers = Numbers()

    @property
    def programs(self) -> list[Program]:
        return [p for p in self._library.programs if p.executable is not None]

    @property
    def eager(self) -> Counter[str]:
        return self._said.eager

    def report(self) -> str:
        """Programs, what ran eagerly and why, refusals, and memory."""
        return self._said.text(self._library.programs, self._packed)

    def call(
        self, model: Any, tokens: mx.array, cache: Sequence[Any] | None, extras: Mapping[str, Any]
    ) -> Any:
        """What the model gives, by a program where there can be one."""
        kinds: list[Any] = [] if cache is None else [kind_of(c) for c in cache]
        why = refusal(tokens, cache, kinds, extras)
        if why:
            return self._eagerly(why, model, tokens, cache, extras)
        self._look_at_weights(model)
        if self._whole and tokens.shape[1] > 1:
            return self._eagerly(self._whole, model, tokens, cache, extras)
        pairs = list(zip(kinds, cache or (), strict=True))
        pads, ends = all(k.pads(c) for k, c in pairs), any(k.ends(c) for k, c in pairs)
        cut = list(self._sizes.pieces(tokens.shape[1], pads, ends))
        length = sum(count for _, _, count in cut)
        why = next((why for k, c in pairs if (why := k.refuses(c, length))), "")
        if why:
            return self._eagerly(why, model, tokens, cache, extras)
        results = []
        for start, valid, count in cut:
            piece = tokens[:, start : start + valid].astype(mx.int32)
            results.append(self._piece(model, piece, count, kinds, cache, extras))
        return results[0] if len(results) == 1 else mx.concatenate(results, axis=1)

    def _look_at_weights(self, model: Any) -> None:
        """Programs of other weights than the model's are of no use any more."""
        with self._lock:
            if self._watch is not None and self._watch.unchanged():
                return
            if self._watch is not None:
                self._said.note("weights changed: programs were made again")
            self._watch = Watch(model)
            self._whole = next((o.reason for _, o in overrides_of(model) if o.whole), "")
            self._forget()

    def _eagerly(
        self, why: str, model: Any, tokens: Any, cache: Any, extras: Mapping[str, Any]
    ) -> Any:
        self._said.ran_eagerly(why)
        return self._maker.own(model, tokens, cache=cache, **extras)

    def _piece(
        self, model: Any, tokens: mx.array, count: int, kinds: Any, cache: Any, extras: Any
    ) -> Any:
        """A call of `count` tokens a row, the first of which are `tokens` and the rest padding."""
        pairs = list(zip(kinds, cache, strict=True))
        form = self._form(model, pairs, tokens, count)
        program = self._library.get(form)
        if program.executable is None:
            return self._eagerly(program.reason, model, tokens, cache, extras)
        program.calls += 1
        if program.checked:
            logits = self._run(program.executable, form, tokens, cache)
            if count == 1:
                self._look_ahead(form, pairs)
            return logits
        before = copy.deepcopy(cache)
        if program.reference is None:
            logits = self._run(program.executable, form, tokens, cache)
            mine = logits, cache
        else:
            tried = copy.deepcopy(cache)
            mine = self._run(program.reference, form, tokens, tried), tried
        difference = self._check.difference(model, kinds, tokens, before, mine)
        if difference is None:
            program.checked = True
            if program.reference is None:
                return logits
            program.reference = None
            return self._run(program.executable, form, tokens, cache)
        program.executable, program.reason = None, str(difference)
        logits = self._eagerly(program.reason, model, tokens, before, extras)
        for c, right in zip(cache, before, strict=True):
            vars(c).update(vars(right))
        return logits

    def _form(self, model: Any, pairs: Any, tokens: mx.array, count: int) -> Form:
        """The form of a call; makes room in the caches for its tokens."""
        rows = tokens.shape[0]
        fresh = count > 1 and all(k.is_empty(c) for k, c in pairs)
        if self._shapes is None:
            after = copy.deepcopy([c for _, c in pairs])  # nothing of it is computed
            self._maker.own(model, tokens[:, :1], cache=after)
            self._shapes = [k.shapes(c) for (k, _), c in zip(pairs, after, strict=True)]
        for (kind, c), like in zip(pairs, self._shapes, strict=True):
            kind.make_room(c, like, rows, count)
        pool = self._numbers.pool([k for k, _ in pairs], [c for _, c in pairs])
        return Form(
            rows, count, fresh, tuple((k, k.fixed(c, count)) for k, c in pairs), pool.places,
            types_of(pool.values), tuple(types_of(k.arrays(c)) for k, c in pairs),
        )  # fmt: skip

    def _run(self, executable: Executable, form: Form, tokens: mx.array, cache: Any) -> mx.array:
        """The logits; the caches are handed over, and come back as they are after the call."""
        kinds = [kind for kind, _ in form.kinds]
        valid, count = tokens.shape[1], form.count
        for kind, c in zip(kinds, cache, strict=True):
            kind.settle(c)
        pool = self._numbers.pool(kinds, cache)
        padded = mx.pad(tokens, [(0, 0), (0, count - valid)]) if count > valid else tokens
        given = [padded, mx.array(valid, mx.int32), *pool.values]
        for kind, c in zip(kinds, cache, strict=True):
            given += kind.arrays(c)
            kind.let_go(c)
        logits, *results = executable.take(given)
        step, at = Step(valid, count, pool.leaders), 0
        for (kind, fixed), some, c in zip(form.kinds, form.arrays, cache, strict=True):
            kind.put(c, fixed, results[at : at + len(some)], step)
            at += len(some)
        self._numbers.follow(pool, kinds, cache)
        return logits[:, :valid] if count > valid else logits

    def _look_ahead(self, form: Form, pairs: Any) -> None:
        """Begin to make the program for the next buffer while there is room for some tokens."""
        left = [room for k, c in pairs if (room := k.room(c)) is not None]
        if not left or min(left) != AHEAD:
            return
        later = copy.deepcopy([c for _, c in pairs])  # nothing of it is computed
        ahead = [(k, c) for (k, _), c in zip(pairs, later, strict=True)]
        for (kind, c), like in zip(ahead, self._shapes or (), strict=True):
            kind.make_room(c, like, form.rows, AHEAD + 1)
        arrays = tuple(types_of(k.arrays(c)) for k, c in ahead)
        kinds = tuple((k, k.fixed(c, 1)) for k, c in ahead)
        self._library.prepare(replace(form, kinds=kinds, arrays=arrays))


def refusal(
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
