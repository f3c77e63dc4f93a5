"""Making the program for a call: a trace of the model over views of its caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import mlx.core as mx

from ...compiler.pipeline import Tune, optimize
from ...compiler.plan import Plan
from ...errors import QGraphError
from ...importer import from_mlx
from ...quantization.config import Quantize
from ...rewrite.ledger import Entry
from ...runtime.executable import Executable
from ...runtime.packing import PackCache, Release
from ...target import Target
from ...tracing.trace import sharing
from ..overrides import overrides_of, standing_in
from .call import Call
from .form import Form
from .shadow import shadow
from .store import Store

Own = Callable[..., Any]
"""The call of a model's class, which runs without programs."""

CHANCES = 3
"""Where rounding decides which experts a router chooses, program and model part at some tokens,
each as often nearer to float32 as the other; a program that is wrong parts at all of them."""


@dataclass
class Program:
    """One program of a model.

    Attributes:
        executable: None where the model runs this itself.
        reason: why it does.
        checked: was it found to give what the model gives?
        chances: how often it may still part from it, as rounding makes it, before it is given up.
        kept: was it read from the disk?
        reference: what is compared in place of a program whose weights are quantized further.
    """

    form: Form
    executable: Executable | None = None
    plan: Plan | None = None
    reason: str = ""
    seconds: float = 0.0
    checked: bool = False
    chances: int = CHANCES
    kept: bool = False
    reference: Executable | None = None
    calls: int = 0

    def ledger(self) -> list[Entry]:
        """What passes and lowering decided; of a program that was read, lowering alone."""
        if self.plan is not None:
            return self.plan.ledger()
        return [] if self.executable is None else self.executable.entries


@dataclass(frozen=True)
class Maker:
    """How a model's programs are made; arguments as for `qg.optimize`."""

    own: Own
    target: Target
    quantize: Quantize | None
    tune: Tune

    @property
    def settings(self) -> str:
        """What programs depend on beside the model."""
        packing = "" if self.quantize is None else self.quantize.digest()
        return f"{self.target} {self.quantize} {packing} {self.tune}"

    def make(
        self,
        model: Any,
        form: Form,
        packed: PackCache,
        store: Store | None = None,
        release: Release = False,
    ) -> Program:
        """A program for calls of this form, or the reason why there is none; never raises."""
        start = time.perf_counter()
        program = Program(form)
        try:
            graph = None if store is None else store.read(form, packed)
            # What was quantized further was compared before that, when it was written.
            program.kept = graph is not None
            program.checked = program.kept and self.quantize is not None
            if graph is None:
                with sharing(packed.constants):
                    source = self._graph(model, form)
                program.plan = optimize(
                    source, target=self.target, quantize=self.quantize, tune=self.tune, check=False,
                    states=form.states(),
                )  # fmt: skip
                graph = program.plan.graph
            program.executable = Executable(
                graph, self.target, packed, release=release, progress=None, states=form.states()
            )
            if program.plan is not None:
                program.plan = program.plan.lowered_as(program.executable.entries)
            if program.plan is not None and self.quantize is not None and not release:
                program.reference = Executable(
                    program.plan.source, self.target, PackCache(), release=False, progress=None
                )
        except QGraphError as error:
            program.reason = error.what
        except Exception as error:  # mlx-lm would not have raised it, so nor does its model here
            program.reason = f"{type(error).__name__}: {error}"
        program.seconds = time.perf_counter() - start
        return program

    def _graph(self, model: Any, form: Form) -> Any:
        own, found = self.own, overrides_of(model)
        rank = max([override.rank for _, override in found], default=2)
        additive = any(override.additive for _, override in found)

        def step(
            model: Any, tokens: mx.array, numbers: Any, arrays: Any
        ) -> tuple[mx.array, list[Any]]:
            valid = numbers[-1] if form.count > 1 else mx.array(1, mx.int32)
            call = Call(form.count, valid, form.fresh, rank, additive)
            views = [
                kind.view(fixed, [numbers[i] for i in places], some, call)
                for (kind, fixed), places, some in zip(form.kinds, form.places, arrays, strict=True)
            ]
            with standing_in(found, model, call, views):
                logits = own(model, tokens, cache=views)
            pairs = zip(form.kinds, views, strict=True)
            return logits, [kind.results(view) for (kind, _), view in pairs]

        tokens = mx.zeros((form.rows, form.count), mx.int32)
        numbers = [mx.zeros(*of) for of in form.numbers]
        if form.count > 1:
            numbers.append(mx.array(0, mx.int32))  # how many of the tokens are no padding
        arrays = [[mx.zeros(*of) for of in some] for some in form.arrays]
        return from_mlx(
            MethodType(step, shadow(model)), tokens, numbers, arrays,
            name=type(model).__name__,
        )  # fmt: skip
