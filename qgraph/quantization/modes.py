"""The modes of quantization: which bits and group sizes each allows.

They are MLX's: `affine` (a scale and a zero point a group), `mxfp4` and `mxfp8` (OCP
Microscaling Formats, v1.0) and `nvfp4` (4-bit floats with an E4M3 scale for 16 of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import QuantizationError


@dataclass(frozen=True, slots=True)
class Mode:
    """What a mode allows; the first bits and group size are its defaults."""

    name: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    has_biases: bool


MODES = {
    "affine": Mode("affine", (4, 2, 3, 5, 6, 8), (64, 32, 128), True),
    "mxfp4": Mode("mxfp4", (4,), (32,), False),
    "mxfp8": Mode("mxfp8", (8,), (32,), False),
    "nvfp4": Mode("nvfp4", (4,), (16,), False),
}
FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def choices(allowed: tuple[Any, ...]) -> str:
    """What may be given, in words.

    >>> choices((4, 2, 3))
    '2, 3 or 4'
    """
    words = [str(a) for a in sorted(allowed, key=str if isinstance(allowed[0], str) else None)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def resolve(op: str, group_size: int | None, bits: int | None, mode: str) -> tuple[int, int]:
    """The group size and bits of a call, with the mode's defaults for those left out."""
    if not isinstance(mode, str) or mode not in MODES:
        raise QuantizationError(
            f"{op}: mode={mode!r} is not a mode", hint=f"mode may be {choices(tuple(MODES))}"
        )
    allowed = MODES[mode]
    group_size = allowed.group_sizes[0] if group_size is None else group_size
    bits = allowed.bits[0] if bits is None else bits
    if type(bits) is not int or bits not in allowed.bits:
        raise QuantizationError(
            f"{op}: bits={bits!r} is not in mode {mode!r}",
            hint=f"bits may be {choices(allowed.bits)}",
        )
    if type(group_size) is not int or group_size not in allowed.group_sizes:
        raise QuantizationError(
            f"{op}: group_size={group_size!r} is not in mode {mode!r}",
            hint=f"group_size may be {choices(allowed.group_sizes)}",
        )
    return group_size, bits
