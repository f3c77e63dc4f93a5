"""Words for what a traced function did to symbolic tensors outside of qgraph."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import QGraphError, TraceError
from ..origin import NOWHERE, raised_at

_TENSOR = "qgraph.tracing.tensor.Tensor"


@contextmanager
def explained() -> Iterator[None]:
    """Turn what MLX says of arguments of an unknown class into words about tracing.

    Raises:
        TraceError: an `mlx.core` function was called on a symbolic tensor.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(error, QGraphError) or _TENSOR not in str(error):
            raise
        origin = raised_at(error)
        called = re.match(r"(\w+)\(\): incompatible function arguments", str(error))
        if called:
            raise TraceError(
                f"mlx.core's {called[1]} was called on a symbolic tensor",
                hint=f"call qg.{called[1]}, the function of the same name in qgraph",
                origin=origin,
            ) from None
        raise TraceError(
            "an mx.array cannot be made of symbolic tensors",
            hint="put them together with qg.stack or qg.concatenate",
            origin=origin,
        ) from None


def refuse_leaks(nodes: Sequence[Any], start: int) -> None:
    """Refuse what another trace or a loop body made; nodes of this trace come after `start`."""
    leaked = next((node for node in nodes if node.op == "input"), None)
    if leaked is None:
        return
    foreign = {leaked}
    for node in nodes:
        if any(v.node in foreign for v in node.inputs):
            foreign.add(node)
    readers = [n for n in nodes if n in foreign and n is not leaked and n.serial > start]
    mixed = [n for n in readers if any(v.node not in foreign and v.node.op != "constant"
                                       for v in n.inputs)]  # fmt: skip
    user = next(iter(mixed or readers), None)
    raise TraceError(
        f"a tensor ({leaked.output.type}) of another trace, or of a loop body, was used after that "
        "trace ended",
        hint="pass it in as an argument, or return it from the loop body that made it",
        origin=user.origin if user else NOWHERE,
    )
