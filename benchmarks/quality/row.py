"""What a row is, and the methods of `Quantize.fit` that have rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

METHODS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "scales": ("scales",),
    "gptq": ("gptq",),
    "awq": ("scales", "awq"),  # AWQ clips ranges too, which is what searching scales does
    "sensitivity": ("sensitivity",),
    "default": ("scales", "gptq", "sensitivity"),
    "all": ("scales", "awq", "gptq", "sensitivity"),
}


class Task(ABC):
    """A model, data to fit on, and a measure on data that was not.

    Attributes:
        model: with floats.
        title, measure: what the table says.
        bits: the budgets, bits a number.
        others: methods that are not ours.
        folder: where fits keep what they learn, for those of other budgets.
    """

    model: Any
    title: str
    measure: ClassVar[str]
    bits: ClassVar[Sequence[float]]
    others: ClassVar[Sequence[str]] = ()
    folder: Path | None = None

    @abstractmethod
    def __init__(self, tokens: int) -> None:
        """Read the model and the data."""

    @abstractmethod
    def row(self, bits: float, method: str) -> dict[str, Any] | None:
        """Bytes, the measure's value, and its gap to the float model's; None: no such choice."""

    def budget(self, bits: float) -> int:
        """The bytes of so many bits for each number that may be packed."""
        layers = [m for _, m in self.model.named_modules() if hasattr(m, "to_quantized")]
        return int(bits / 8 * sum(m.weight.size for m in layers))
