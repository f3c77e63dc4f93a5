"""Calls of ops that MLX's export refuses, carried through it by kernels that never run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..tree import Tree, flatten

UNSAID = (
    "logcumsumexp", "segmented_mm", "to_fp8", "from_fp8", "qqmm", "gather_qqmm", "linalg.lu",
    "linalg.lu_factor", "linalg.solve", "linalg.det", "linalg.slogdet", "quantize", "dequantize",
)  # fmt: skip
_EXPORTED = {"quantize": ("affine",), "dequantize": ("affine", "mxfp4")}
"""Modes in which the op arrives as itself or as parts that a pass raises again."""
_MARK = "qgraph_marker"


@dataclass
class Marker:
    """A call of an op that MLX does not export.

    Attributes:
        form: of its arguments.
        leaves: what they hold; None stands for an array.
    """

    op: str
    form: Tree
    leaves: list[Any]
    stream: Any

    def arguments(self, arrays: Sequence[Any]) -> Any:
        """Positional and keyword arguments, with these in place of the arrays."""
        rest = iter(arrays)
        return self.form.build([next(rest) if x is None else x for x in self.leaves])


class Markers:
    """Calls that the export would refuse, carried through it by kernels that never run."""

    def __init__(self) -> None:
        self.calls: list[Marker] = []

    def replacing(self, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, but as a marker."""

        def marked(*args: Any, stream: Any = None, **kwargs: Any) -> Any:
            if _mode(args, kwargs) in _EXPORTED.get(op, ()):
                return function(*args, **kwargs)
            stream = "cpu" if op.startswith("linalg.") else stream
            on = {} if stream is None else {"stream": mx.cpu if stream == "cpu" else stream}
            result = function(*args, **kwargs, **on)
            outputs = result if isinstance(result, list | tuple) else [result]
            leaves, form = flatten((args, kwargs), static=True)
            arrays = [leaf for leaf in leaves if isinstance(leaf, mx.array)]
            kept = [None if isinstance(leaf, mx.array) else leaf for leaf in leaves]
            kernel: Any = mx.fast.metal_kernel(
                name=f"{_MARK}_{len(self.calls)}_",
                input_names=[f"i{k}" for k in range(len(arrays))],
                output_names=[f"o{k}" for k in range(len(outputs))],
                source="",
            )
            self.calls.append(Marker(op, form, kept, stream))
            made = kernel(
                inputs=arrays,
                output_shapes=[a.shape for a in outputs],
                output_dtypes=[a.dtype for a in outputs],
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
            )
            return type(result)(made) if isinstance(result, list | tuple) else made[0]

        return marked

    def of(self, kernel_name: str) -> Marker | None:
        """The call that the kernel of this name stands for."""
        _, mark, rest = kernel_name.partition(_MARK)
        return self.calls[int(rest.split("_")[1])] if mark else None


def _mode(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    named = [a for a in args if isinstance(a, str)]
    return kwargs.get("mode", named[0] if named else "affine")
