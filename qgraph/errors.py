"""Errors for people: what was wrong, where in their file, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .origin import NOWHERE, Origin, user_frame


class QGraphError(Exception):
    """Base of every error that qgraph raises about a user's program.

    The text has up to three parts: what was wrong, the user's line, and what to do.
    """

    def __init__(self, what: str, *, hint: str = "", origin: Origin | None = None) -> None:
        self.what, self.hint = what, hint
        self.origin = user_frame() if origin is None else origin
        super().__init__(self._format())

    def _format(self) -> str:
        lines = [self.what]
        if self.origin is not NOWHERE and str(self.origin):
            place = (
                f"{self.origin.file}:{self.origin.line}" if self.origin.line else self.origin.label
            )
            lines.append(f"  at {place}")
            if source := self.origin.source():
                lines.append(f"    {source}")
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)


class ShapeError(QGraphError, ValueError):
    """Shapes or dtypes that do not fit an operation."""


class QuantizationError(QGraphError, ValueError):
    """A mode, group size, bit width, scales or biases that do not belong together."""


class TraceError(QGraphError, TypeError):
    """A symbolic tensor used where only a value known now can stand."""


class ControlFlowError(QGraphError, TypeError):
    """Carried values whose types or tree change from one turn of a loop to the next."""


class VerifyError(QGraphError):
    """A graph that breaks a promise of its form; names the node."""


class InputError(QGraphError, ValueError):
    """Arguments that a function of qgraph does not take, or that a program was not made for."""


class UnsupportedError(QGraphError, NotImplementedError):
    """Something that MLX or the target cannot do; the hint names a way round."""


class ContractError(QGraphError):
    """A pass whose result differs from its input by more than it promised."""


class MeshError(QGraphError, RuntimeError):
    """Ranks of a mesh that cannot go on together; names the rank."""


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Words for a file or folder that cannot be written.

    Raises:
        QGraphError: names the path and what the system says.
    """
    try:
        yield
    except OSError as error:
        raise QGraphError(
            f"{place} cannot be written: {error.strerror or error}",
            hint="give a path in a folder that you may write to",
        ) from None
