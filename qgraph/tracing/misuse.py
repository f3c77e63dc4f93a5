"""Words for what cannot be traced, and for what a function did to tensors outside of qgraph."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import InputError, QGraphError, TraceError
from ..ir.ops import OPS
from ..origin import NOWHERE, raised_at

_TENSOR = "qgraph.tracing.tensor.Tensor"
_CAST = "std::bad_cast"
_TRANSFORMED = "[tree_flatten] The argument should contain only arrays"


_MODULES = "call a module of mlx.nn by qg.call(module, x), or import all by qg.from_mlx(model, x)"


def _ours(name: str) -> str:
    """The function of the same name in qgraph, such as `qg.fast.rms_norm`."""
    known = [op for op in OPS if op.rpartition(".")[2] == name]
    if not known:
        return f"qg.call(mx.{name}, ...)"
    return f"qg.{known[0]}, the function of the same name in qgraph"


@contextmanager
def explained() -> Iterator[None]:
    """Turn what MLX says of arguments of an unknown class into words about tracing.

    Raises:
        TraceError: an `mlx.core` function was called on a symbolic tensor.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        words = str(error)
        called = re.match(r"(\w+)\(\): incompatible function arguments", words)
        # Of lists MLX says no more than that they are lists.
        among = called is not None and re.search(
            r"Invoked with types: .*\b(list|tuple|dict)\b", words
        )
        ours = any(sign in words for sign in (_TENSOR, _TRANSFORMED, _CAST)) or among
        if isinstance(error, QGraphError) or not ours:
            raise
        origin = raised_at(error)
        if called and among and _TENSOR not in words:
            raise TraceError(
                f"mlx.core's {called[1]} was called on arguments that it does not take",
                hint=f"if they hold symbolic tensors, call {_ours(called[1])}",
                origin=origin,
            ) from error
        if _CAST in words:
            raise TraceError(
                "a function of MLX was called on symbolic tensors",
                hint="call the function of the same name in qgraph, such as qg.einsum",
                origin=origin,
            ) from None
        if called:
            in_module = f"{os.sep}mlx{os.sep}nn{os.sep}" in origin.file
            raise TraceError(
                f"mlx.core's {called[1]} was called on a symbolic tensor",
                hint=_MODULES if in_module else f"call {_ours(called[1])}",
                origin=origin,
            ) from None
        if words.startswith("[compile]"):
            raise TraceError(
                "a function that mx.compile made, as those of mlx.nn are, was called on a symbolic "
                "tensor",
                hint="call it by qg.call(nn.relu, x); qg.relu, qg.silu and qg.gelu are there too",
                origin=origin,
            ) from None
        if _TRANSFORMED in words:
            raise TraceError(
                "a transformation of MLX (vmap, grad, vjp or their like) was called on a symbolic "
                "tensor",
                hint="import what it gives, by qg.from_mlx(mx.vmap(fn), x), or call it by "
                "qg.call(mx.vmap(fn), x), with fn a function of mlx.core",
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


def refuse_misfit(fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse what is no function, or does not take these arguments."""
    if not callable(fn):
        raise TraceError(
            f"a {type(fn).__name__} is no function",
            hint="give a function of tensors; a graph is compiled as it is: qg.compile(graph)",
        )
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # without a signature the function says itself what it takes
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(fn, "__name__", type(fn).__name__).strip("<>")
        raise TraceError(
            f"{name}{signature} was described by {len(args) + len(kwargs)} arguments: {error}",
            hint="give a qg.spec, or an example array, for each argument",
        ) from None


def checked_positions(
    positions: Any, count: int | None = None, name: str = "parameters"
) -> set[int]:
    """Positions of arguments, all of which must be there if it is known how many there are."""
    sequence = isinstance(positions, Collection) and not isinstance(positions, str | bytes | dict)
    last = 2**31 if count is None else count - 1
    if not sequence or any(type(p) is not int or not 0 <= p <= last for p in positions):
        some = f"0 to {last}" if count else "none"
        raise InputError(
            f"{name}={positions!r}",
            hint="give positions of arguments, as a list"
            + ("" if count is None else f"; there are {some}"),
        )
    return set(positions)
