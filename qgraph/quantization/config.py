"""`Quantize`: which weights of a graph to quantize, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ..errors import QuantizationError
from .checked import resolve

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

    def __post_init__(self) -> None:
        group_size, bits = resolve("Quantize", self.group_size, self.bits, self.mode)
        object.__setattr__(self, "group_size", group_size)
        object.__setattr__(self, "bits", bits)
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

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `qg.quantize`."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

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


def _refusal(name: str, given: object, hint: str) -> QuantizationError:
    return QuantizationError(f"Quantize: {name}={given!r}", hint=hint)
