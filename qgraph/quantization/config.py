"""`Quantize`: which weights of a graph to quantize, and how."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import QuantizationError
from .fitted import Fitted
from .fitted_files import read_fitted, write_fitted
from .modes import resolve

Predicate = Callable[[str, tuple[int, ...]], Any]


@dataclass(frozen=True)
class Quantize:
    """Which weights to quantize, and how.

    Attributes:
        bits, group_size, mode: as for `qg.quantize`; by default those of the mode.
        where: a glob on weights' names; a predicate on (name, shape); or a table of rules from
            glob to answer, of which the first that matches counts.  A weight is left as it is
            where the answer is False or nothing matches; answers of True, a dict of some of bits,
            group_size and mode, or another `Quantize` quantize it.
        embeddings: an answer for weights whose rows are looked up; None asks `where`.
        head: an answer for weights whose product is an output of the graph; None asks `where`.
            A weight that is both follows `embeddings`.
        activations: 8 to round what the weights are multiplied by to 8 bits too, where a product
            has rows enough to be faster so; see the pass `round-activations` for what it rounds.
        fitted: the numbers that `fit` found, by weight; they count where the weight is still to
            have the bits, group size and mode that they are for.
        folded: what `fit` divides the channels of some weights by, and multiplies those that read
            them by, before they are quantized; by name of the weight that is divided.

    Raises:
        QuantizationError: bits or group size that the mode does not have.

    >>> rules = {"*.down_proj.weight": {"bits": 6}, "*.gate.weight": False, "*": True}
    >>> mixed = Quantize(bits=4, where=rules, embeddings=Quantize(bits=8))
    >>> mixed.answer("layers.0.mlp.down_proj.weight", (64, 128)).bits
    6
    >>> mixed.answer("layers.0.gate.weight", (8, 64)) is None
    True
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    where: str | Predicate | Mapping[str, Any] | None = None
    embeddings: Any = None
    head: Any = None
    activations: int | None = None
    fitted: Mapping[str, Fitted] | None = field(default=None, compare=False, repr=False)
    folded: Mapping[str, mx.array] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        group_size, bits = resolve("Quantize", self.group_size, self.bits, self.mode)
        object.__setattr__(self, "group_size", group_size)
        object.__setattr__(self, "bits", bits)
        if self.activations not in (None, 8):
            raise _refusal("activations", self.activations, "give 8, or None to leave them")
        where = self.where
        if isinstance(where, Mapping):
            for pattern, answer in where.items():
                if not isinstance(pattern, str):
                    raise _refusal("where", where, "the rules go from a glob to an answer")
                self._read(answer)
        elif not (where is None or isinstance(where, str) or callable(where)):
            raise _refusal("where", where, "give a glob, a function of (name, shape), or rules")
        for side in (self.embeddings, self.head):
            self._read(side)

    @classmethod
    def as_mlx(cls, model: Any, name: str = "", **settings: Any) -> Quantize:
        """What `mlx.nn.quantize` would quantize in a module that was imported, and nothing else.

        Layers are asked whether they can be quantized, and a model of mlx-lm that says how its
        layers want it (`quant_predicate`) is followed.  By default any weight of a product is
        quantized, such as that of an expert router which is no `nn.Linear`.

        Args:
            model: the module.
            name: the variable by which an imported function sees the module.
            settings: bits, group_size and mode.

        >>> import mlx.nn as nn
        >>> config = Quantize.as_mlx(nn.Sequential(nn.Linear(64, 64), nn.RMSNorm(64)), bits=8)
        >>> config.answer("layers.0.weight", (64, 64)).bits, config.answer("gate", (64, 64))
        (8, None)
        """
        dot = f"{name}." if name else ""
        layers = {
            f"{dot}{path}.weight": (path, module)
            for path, module in model.named_modules()
            if hasattr(module, "to_quantized")
        }
        predicate = getattr(model, "quant_predicate", None)

        def where(weight: str, shape: tuple[int, ...]) -> Any:
            found = layers.get(weight)
            return found is not None and (predicate is None or predicate(*found))

        return cls(where=where, **settings)

    @staticmethod
    def fit(
        model: Any,
        data: Iterable[Any],
        *,
        bits: float | None = None,
        bytes: int | None = None,
        methods: Sequence[str] = ("scales", "gptq", "sensitivity"),
        formats: Sequence[Mapping[str, Any]] | None = None,
        where: Any = None,
        result: str = "values",
        scales: mx.Dtype | None = None,
        folder: str | Path | None = None,
    ) -> Quantize:
        """The best bits and numbers for the weights of a graph under a budget, from data.

        What comes back has a rule for each weight by its name, to be read and edited, and the
        numbers that were found for it in `fitted`.

        Args:
            model: a graph, an `mlx.nn.Module`, or a function to trace.
            data: inputs of the function, an array or a tuple of arguments each, all of one shape.
            bits: the mean over all numbers of the weights, scales and biases included: plain 4 bits
                in groups of 64 with scales of float16 make 4.5.
            bytes: of all packed weights, instead of `bits`.
            methods: "scales" searches scales and biases with weighted error; "gptq" lets later
                columns make up for the rounding of earlier ones; "sensitivity" gives each weight
                the format that serves the result best, where it else is one for all; "awq" scales
                columns by the size of their inputs, where the graph lets that be undone before.
            formats: what may be chosen, dicts of bits, group_size and mode; by default all there
                are.
            where: which weights, as for `Quantize`, or another `Quantize`.
            result: "logits" if the result is to be as likely, "values" if it is to be as near.
            scales: the dtype that affine scales and biases are kept in; by default the weight's.
            folder: where to keep what is done, so that a fit that was broken off goes on there,
                and what was learned from the data serves another budget.

        Raises:
            InputError: a budget below the smallest formats, data of differing shapes, or no data.

        Sources: arXiv:2210.17323 (GPTQ), arXiv:2306.00978 (AWQ); the choice of formats is a
        multiple-choice knapsack over costs from the Fisher information.  On Linux CPUs products run
        in NumPy.

        >>> import mlx.core as mx, mlx.nn as nn
        >>> mx.random.seed(0)
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> data = [mx.random.normal((8, 64)) for _ in range(4)]
        >>> config = Quantize.fit(model, data, bits=5.5)
        >>> sum(one.nbytes for one in config.fitted.values()) <= 2 * 64 * 64 * 5.5 / 8
        True
        """
        options = dict(bits=bits, bytes=bytes, methods=methods, formats=formats, where=where)
        return _fitter(model, data, **options, result=result, scales=scales, folder=folder)

    def save(self, path: str | Path) -> Path:
        """Write rules and fitted numbers to one file, of safetensors.

        Raises:
            QuantizationError: `where` is a function, which cannot be written.
        """
        path = Path(path)
        write_fitted(path, self.fitted or {}, {"config": _as_json(self)}, self.folded or {})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Quantize:
        """What `save` wrote."""
        fitted, said, folded = read_fitted(Path(path))
        return replace(_from_json(said["config"]), fitted=fitted or None, folded=folded or None)

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `qg.quantize`."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def digest(self) -> str:
        """A mark of all that it says: of rules as they print, and of the fitted numbers."""
        found = hashlib.blake2b(repr(self).encode(), digest_size=16)
        for name, one in sorted((self.fitted or {}).items()):
            found.update(repr((name, one.settings, one.mark)).encode())
            for part in one.parts:
                found.update(np.array(part.view(mx.uint8)).tobytes())
        for name, factors in sorted((self.folded or {}).items()):
            found.update(name.encode() + np.array(factors).tobytes())
        return found.hexdigest()

    def patterns(self) -> list[str]:
        """The globs of `where`, in order."""
        if isinstance(self.where, str):
            return [self.where]
        return list(self.where) if isinstance(self.where, Mapping) else []

    def matching(self, name: str) -> str | None:
        """The first glob of `where` that `name` matches."""
        return next((p for p in self.patterns() if fnmatchcase(name, p)), None)

    def answer(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        is_embedding: bool = False,
        is_head: bool = False,
    ) -> Quantize | None:
        """How to quantize the weight of this name and shape, or None to leave it."""
        if is_embedding and self.embeddings is not None:
            return self._read(self.embeddings)
        if is_head and self.head is not None:
            return self._read(self.head)
        if self.where is None:
            return self
        if callable(self.where):
            return self._read(self.where(name, shape))
        found = self.matching(name)
        if found is None:
            return None
        return self if isinstance(self.where, str) else self._read(self.where[found])

    def _read(self, answer: Any) -> Quantize | None:
        if isinstance(answer, bool) or answer is None:
            return self if answer else None
        if isinstance(answer, Quantize):
            return answer
        if isinstance(answer, Mapping) and set(answer) <= {"bits", "group_size", "mode"}:
            # Another mode brings its own bits and group size, unless they are given.
            fresh = {"bits": None, "group_size": None} if "mode" in answer else {}
            plain = {"where": None, "embeddings": None, "head": None}
            return replace(self, **(plain | fresh | dict(answer)))
        raise QuantizationError(
            f"Quantize: a rule answered {answer!r}",
            hint="answer True, False, another Quantize, or a dict of bits, group_size and mode",
        )


def _refuse_to_fit(*_: Any, **__: Any) -> Quantize:
    raise QuantizationError("qgraph.fitting is not imported", hint="import qgraph")


_fitter: Callable[..., Quantize] = _refuse_to_fit


def set_fitter(fit: Callable[..., Quantize]) -> None:
    """How `Quantize.fit` fits; the room for that, which is above, sets it."""
    global _fitter
    _fitter = fit


def _as_json(config: Quantize) -> dict[str, Any]:
    def of(answer: Any) -> Any:
        if isinstance(answer, Quantize):
            return {"quantize": _as_json(answer)}
        return dict(answer) if isinstance(answer, Mapping) else answer

    if callable(config.where):
        raise QuantizationError(
            "Quantize.save: where is a function, which cannot be written",
            hint="give it as rules from globs to answers",
        )
    where: Any = config.where
    if isinstance(where, Mapping):
        where = [[pattern, of(answer)] for pattern, answer in where.items()]
    sides = {"embeddings": of(config.embeddings), "head": of(config.head)}
    said = {**config.settings, "where": where, **sides}
    return said if config.activations is None else {**said, "activations": config.activations}


def _from_json(said: Mapping[str, Any]) -> Quantize:
    def of(answer: Any) -> Any:
        if isinstance(answer, Mapping) and "quantize" in answer:
            return _from_json(answer["quantize"])
        return answer

    where = said["where"]
    if isinstance(where, list):
        where = {pattern: of(answer) for pattern, answer in where}
    sides = {side: of(said[side]) for side in ("embeddings", "head")}
    return Quantize(**{**said, "where": where, **sides})


def _refusal(name: str, given: object, hint: str) -> QuantizationError:
    return QuantizationError(f"Quantize: {name}={given!r}", hint=hint)
