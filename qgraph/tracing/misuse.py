"""Words for what cannot be traced, and for what a function did to tensors outside of qgraph."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..errors import InputError, QGraphError, TraceError
from ..ir.ops import OPS
from ..origin import NOWHERE, raised_at, user_frame

_TENSOR = "qgraph.tracing.tensor.Tensor"
_MODULES = "call a module of mlx.nn by qg.call(module, x), or import all by qg.from_mlx(model, x)"

Words = tuple[str, str]
"""What was wrong, and what to do."""


@contextmanager
def explained() -> Iterator[None]:
    """Turn what MLX says of arguments of an unknown class into words about tracing.

    Raises:
        TraceError: a function of MLX was called on a symbolic tensor.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        origin = raised_at(error)
        found = None if isinstance(error, QGraphError) else _explanation(str(error), origin.file)
        if found is None:
            raise
        what, hint = found
        raise TraceError(what, hint=hint, origin=origin) from None


def _explanation(said: str, file: str) -> Words | None:
    """Words for what MLX said in a file, if it was about symbolic tensors."""
    if called := re.match(r"(\w+)\(\): incompatible function arguments", said):
        return _of_a_function(called[1], said, file)
    if "[tree_flatten] The argument should contain only arrays" in said:
        return (
            "a transformation of MLX (vmap, grad or their like) was called on a symbolic tensor",
            "import what it gives, by qg.from_mlx(mx.vmap(fn), x), or call it by "
            "qg.call(mx.vmap(fn), x), with fn a function of mlx.core",
        )
    if "std::bad_cast" in said:
        what = "a function of MLX was called on symbolic tensors"
        return what, "call the function of the same name in qgraph, such as qg.einsum"
    if _TENSOR not in said:
        return None
    if said.startswith("[compile]"):
        return (
            "a function that mx.compile made, as mlx.nn does, was called on a symbolic tensor",
            "call it by qg.call(nn.relu, x); qg.relu, qg.silu and qg.gelu are there too",
        )
    what = "an mx.array cannot be made of symbolic tensors"
    return what, "put them together with qg.stack or qg.concatenate"


def _of_a_function(name: str, said: str, file: str) -> Words | None:
    if _TENSOR in said:
        inside = f"{os.sep}mlx{os.sep}nn{os.sep}" in file
        what = f"mlx.core's {name} was called on a symbolic tensor"
        return what, _MODULES if inside else f"call {_ours(name)}"
    # Of lists MLX says no more than that they are lists.
    if not re.search(r"Invoked with types: .*\b(list|tuple|dict)\b", said):
        return None
    what = f"mlx.core's {name} was called on arguments that it does not take"
    return what, f"if they hold symbolic tensors, call {_ours(name)}"


def _ours(name: str) -> str:
    """The function of the same name in qgraph, such as `qg.fast.rms_norm`."""
    known = [op for op in OPS if op.rpartition(".")[2] == name]
    if not known:
        return f"qg.call(mx.{name}, ...)"
    return f"qg.{known[0]}, the function of the same name in qgraph"


@contextmanager
def drawing_told(fn: Callable[..., Any], name: str) -> Iterator[None]:
    """Warn if MLX draws random numbers without a key meanwhile: they are constants from then on."""
    state: Any = mx.random.state
    before = state[0]
    yield
    if state[0] is before or mx.array_equal(state[0], before):  # an import puts it back
        return
    code = getattr(fn, "__code__", None)
    here = user_frame()
    file, line = (here.file, here.line) if code is None else (code.co_filename, code.co_firstlineno)
    warnings.warn_explicit(
        f"{name} draws random numbers by mlx.core without a key, as nn.Dropout does, so the "
        "program gives the same ones at every call; call qg.random with key=, an argument of the "
        "function",
        UserWarning,
        file,
        line,
    )


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
            f"it is of type {type(fn).__name__}, and no function",
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
