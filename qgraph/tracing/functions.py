"""The ops as functions, with the names and signatures of `mlx.core`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..ir.graph import StreamLike
from ..ir.op import Op
from ..ir.ops import ALIASES, OPS
from .tensor import apply


def _function(op: Op) -> Callable[..., Any]:
    def call(*args: Any, stream: StreamLike = None, **kwargs: Any) -> Any:
        return apply(op.name, args, kwargs, stream)

    short = op.name.rpartition(".")[2]
    call.__name__ = call.__qualname__ = short
    parameters = [*op.signature.parameters.values()]
    parameters.append(inspect.Parameter("stream", inspect.Parameter.KEYWORD_ONLY, default=None))
    call.__signature__ = op.signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__doc__ = f"`mlx.core.{op.name}` on tensors; at once when given arrays alone.\n\n" + (
        op.fn.__doc__ or ""
    )
    return call


FUNCTIONS: dict[str, Callable[..., Any]] = {name: _function(op) for name, op in OPS.items()}
FUNCTIONS.update({alias: FUNCTIONS[name] for alias, name in ALIASES.items()})
