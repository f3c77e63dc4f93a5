"""Weights in a file, checked before MLX reads them.

`mx.load` believes what a safetensors file says of itself and reads later, in a thread of its own:
a number that lies past the end ends the process (mlx 0.32.4).
Format: https://github.com/huggingface/safetensors (8 bytes that hold the length of a header in
JSON, the header, the numbers).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import QGraphError

_DTYPES = {
    **{"BOOL": mx.bool_, "U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64},
    **{"I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64, "C64": mx.complex64},
    **{"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32, "F64": mx.float64},
}
_MOST = 100 << 20
"""Bytes of a header; the format allows no more."""


def read(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file by name.

    Raises:
        QGraphError: the file is cut off, or says of itself what is not so.
    """
    try:
        _check(path)
        arrays = mx.load(str(path), format="safetensors")
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise QGraphError(
            f"{path} cannot be read as weights ({error})",
            hint="it was cut off or damaged: save the program again",
        ) from None
    assert isinstance(arrays, dict)
    return arrays


def _check(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        sizes = [*shape, start, stop]
        if any(type(n) is not int or n < 0 for n in sizes) or max(shape, default=0) >= 2**31:
            raise ValueError(f"{name} of shape {shape} from byte {start} to {stop}")
        wanted = math.prod(shape) * _DTYPES[entry["dtype"]].size
        if stop - start != wanted or stop > size - 8 - length:
            raise ValueError(f"{name} takes {wanted} bytes and lies from {start} to {stop}")
