"""What stands behind an accelerated model: its programs, and what runs without one."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..runtime.packing import PackCache
from .caches.kind import Needs
from .caches.numbers import Numbers, Pool
from .caches.of_call import Caches
from .overrides import overrides_of
from .programs.background import Library, Then
from .programs.check import Check
from .programs.form import Form, types_of
from .programs.maker import Maker, Program
from .programs.pieces import sizes_for
from .programs.run import first_run, run
from .programs.store import Store
from .programs.weights import Watch
from .ranks import Ranks
from .report import Report

AHEAD = 64
"""So many tokens before a buffer is full the program for the next one is begun."""


FIRST = 3
"""At so many calls of a token programs are begun: the first one has then been given away.  A prompt
of a form that was there before begins them at once, and so does, on CPUs, what lies on the disk."""


PATIENCE = 64
"""Up to so many tokens the model takes itself on a CPU while their program is being made."""


FEW = 8
"""The same where the program lies on the disk, and in half precision, slow by MLX on CPUs."""


class Acceleration:
    """The programs of one model, which `model.qgraph` is.

    Attributes:
        programs: those that were made.
        eager: how often what ran without a program, by the reason.
    """

    def __init__(
        self, model: Any, maker: Maker, background: bool = True, keep: bool | Path = False
    ) -> None:
        self._ranks = Ranks(maker.target.mesh, model)
        self._model = model
        self._background = background and not self._ranks.launched
        self._keep = keep if maker.target.mesh is None else False  # parts of weights are a rank's
        self._store: Store | None = None
        self._maker = maker
        self._sizes = sizes_for(maker.target)
        self._lock = threading.RLock()
        self._said = Report()
        self._check = Check(maker.own, maker.target)
        self._watch: Watch | None = None
        self._forget()

    def _forget(self) -> None:
        packed = self._packed = PackCache()
        model, store = self._model, self._store
        release = self._ranks.release(packed.constants)
        self._library = Library(lambda form: self._maker.make(model, form, packed, store, release))
        self._shapes: list[Any] | None = None
        self._numbers = Numbers()
        self._last: tuple[Any, Form] | None = None
        self._wishes: dict[Form, tuple[mx.array, Caches]] = {}
        self._wished: Counter[Form] = Counter()

    @property
    def programs(self) -> list[Program]:
        return [p for p in self._library.programs if p.executable is not None]

    @property
    def eager(self) -> Counter[str]:
        return self._said.eager

    def warm(self) -> None:
        """Make the programs for a token and for short prompts, and wait for them."""
        before, self._background = self._background, False
        try:
            for count in self._sizes.sizes[:4]:
                cache = make_prompt_cache(self._model)
                for tokens in (mx.zeros((1, count), mx.int32), mx.zeros((1, 1), mx.int32)):
                    mx.eval(self.call(self._model, tokens, cache, {}))
        finally:
            self._background = before

    def report(self) -> str:
        """Programs, what ran eagerly and why, refusals, and memory."""
        return self._said.text(self._library.programs, self._packed)

    def call(
        self, model: Any, tokens: mx.array, cache: Sequence[Any] | None, extras: Mapping[str, Any]
    ) -> Any:
        """What the model gives, by a program where there can be one."""
        caches = Caches.of(cache)
        why = refusal(tokens, caches, extras)
        if not why:
            self._look_at_weights(model)
            if self._whole and tokens.shape[1] > 1:
                why = self._whole
        if why or caches is None:
            return self._eagerly(why, model, tokens, cache, extras)
        if tokens.shape[1] == 1:
            return self._piece(model, tokens, 1, caches, extras)
        cut = list(self._sizes.pieces(tokens.shape[1], caches.pad, caches.end))
        why = caches.refusal(sum(count for _, _, count in cut))
        if why:
            return self._eagerly(why, model, tokens, cache, extras)
        results = [
            self._piece(model, tokens[:, start : start + valid], count, caches, extras)
            for start, valid, count in cut
        ]
        return results[0] if len(results) == 1 else mx.concatenate(results, axis=1)

    def _look_at_weights(self, model: Any) -> None:
        """Programs of other weights than the model's are of no use any more."""
        with self._lock:
            if self._watch is not None and self._watch.unchanged():
                return
            if self._watch is not None:
                self._ranks.letting_go.check(model)
                self._said.note("weights changed: programs were made again")
            self._watch = Watch(model)
            if self._keep:
                root = self._keep if isinstance(self._keep, Path) else None
                self._store = Store(self._model, self._maker.settings, root)
            self._whole = next((o.reason for _, o in overrides_of(model) if o.whole), "")
            self._forget()

    def _eagerly(
        self, why: str, model: Any, tokens: Any, cache: Any, extras: Mapping[str, Any]
    ) -> Any:
        self._ranks.refuse(why, cache)
        self._said.ran_eagerly(why)
        return self._maker.own(model, tokens, cache=cache, **extras)

    def _piece(self, model: Any, tokens: mx.array, count: int, caches: Caches, extras: Any) -> Any:
        """A call of `count` tokens a row, the first of which are `tokens` and the rest padding."""
        form, pool = self._form(model, tokens, count, caches)
        program = self._library.ready(form)
        if program is None and not self._waits(form):
            self._wish(form, tokens, caches)
            caches.take_back()
            self._said.note("by the model itself while a program was made")
            return self._maker.own(model, tokens, cache=caches.items, **extras)
        program = program or self._library.get(form)
        if program.executable is None:
            caches.take_back()
            return self._eagerly(program.reason, model, tokens, caches.items, extras)
        program.calls += 1
        if program.checked or self._ranks.launched:
            self._ranks.learn(program.executable)
            logits = run(program.executable, form, tokens, caches, self._numbers, pool)
            if count == 1:
                self._look_ahead(form, tokens, caches)
            return logits
        logits = first_run(program, model, tokens, caches, self._check)
        if program.executable is None:
            self._said.ran_eagerly(program.reason)
        elif not program.checked:
            self._said.note("by the model itself where rounding parted it from a new program")
        keep(program, self._store, self._packed)
        return logits

    def _waits(self, form: Form) -> bool:
        """Is a program waited for?  On CPUs the model takes longer for many tokens than that."""
        if not self._background or not self._maker.target.is_cpu:
            return not self._background
        if form.count <= FEW:
            return False
        return form.count > PATIENCE or form.is_half or self._kept(form)

    def _kept(self, form: Form) -> bool:
        """Does the program lie on the disk, so that little is to be done for it?  Asked on CPUs
        alone: on a GPU the weights' bytes would be waited for."""
        return self._maker.target.is_cpu and self._store is not None and self._store.holds(form)

    def _wish(self, form: Form, tokens: mx.array, caches: Caches) -> None:
        """Have a program made in the background, once the first token of an answer is there.

        mlx-lm asks for the second token before it gives away the first.
        """
        self._wished[form] += 1
        self._wishes[form] = tokens, Caches(copy.deepcopy(caches.items), caches.kinds)
        calls = FIRST if form.count == 1 else 2
        if self._wished[form] < calls and not self._kept(form):
            return
        self._wished.clear()
        wishes, self._wishes = self._wishes, {}
        self._prepare([(form, *wish) for form, wish in reversed(wishes.items())])

    def _prepare(self, wanted: Sequence[tuple[Form, mx.array, Caches]]) -> None:
        """Have programs made in the background, and compared from these caches."""
        model, check = self._model, self._check
        # Streams belong to threads: what another one reads must have been computed.
        mx.eval([tokens for _, tokens, _ in wanted], [c.arrays() for _, _, c in wanted])

        store, packed = self._store, self._packed

        def trial(tokens: mx.array, caches: Caches) -> Then:
            def then(program: Program) -> None:
                if not program.checked:
                    mx.eval(first_run(program, model, tokens, caches, check))
                keep(program, store, packed)

            return then

        self._library.prepare([(form, trial(tokens, caches)) for form, tokens, caches in wanted])

    def _form(self, model: Any, tokens: mx.array, count: int, caches: Caches) -> tuple[Form, Pool]:
        """The form of a call, and its numbers; makes room in the caches for its tokens."""
        rows = tokens.shape[0]
        needs = Needs(rows, count, copied=not self._maker.target.is_cpu)
        if self._shapes is None:
            after = Caches(copy.deepcopy(caches.items), caches.kinds)  # nothing of it is computed
            self._maker.own(model, tokens, cache=after.items)
            self._shapes = after.shapes()
        fresh = count > 1 and caches.empty
        caches.make_room(self._shapes, needs)
        pool = self._numbers.pool(caches.kinds, caches.items)
        found = (
            rows, count, fresh, caches.fixed(count), pool.places, types_of(pool.values),
            self._ranks.whole(caches.types()),
        )  # fmt: skip
        if self._last is None or self._last[0] != found:
            self._last = found, Form(*found)
        return self._last[1], pool

    def _look_ahead(self, form: Form, tokens: mx.array, caches: Caches) -> None:
        """Begin to make the program for the next buffer while there is room for some tokens."""
        if caches.room() != AHEAD or self._ranks.launched:
            return
        later = Caches(copy.deepcopy(caches.items), caches.kinds)
        later.make_room(self._shapes or [], Needs(form.rows, AHEAD + 1))
        ahead = replace(form, kinds=later.fixed(1), arrays=later.types())
        self._prepare([(ahead, tokens, later)])


def keep(program: Program, store: Store | None, packed: PackCache) -> None:
    """Write a program to the disk, if it is new there and was found right."""
    if store is not None and program.checked and program.plan is not None and not program.kept:
        store.write(program.form, program.plan.graph, packed)


def refusal(tokens: Any, caches: Caches | None, extras: Mapping[str, Any]) -> str:
    """Why a call cannot go through a program, or nothing."""
    if caches is None:
        return "a call without a cache"
    if not isinstance(tokens, mx.array) or tokens.ndim != 2 or not tokens.size:
        return "tokens that are no array of rows"
    if not mx.issubdtype(tokens.dtype, mx.integer):
        return f"tokens of {tokens.dtype}"
    if caches.unknown:
        return f"a cache of its own kind: {caches.unknown}"
    given = sorted(name for name, thing in extras.items() if thing is not None)
    return f"arguments besides tokens and cache: {', '.join(given)}" if given else ""
