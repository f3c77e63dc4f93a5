"""`compile` and `jit`: from a function or a graph to a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .ir import Graph
from .packing import Progress
from .pipeline import Pass, optimize
from .plan import Plan
from .program import Program
from .quantize_config import Quantize
from .target import Target, as_target
from .tensor import Constants
from .trace import sharing, trace


def compile(
    fn: Graph | Callable[..., Any],
    *specs: Any,
    target: Target | str | mx.Device | None = None,
    quantize: Quantize | None = None,
    passes: Sequence[Pass] | None = None,
    parameters: Sequence[int] = (),
    release: bool | None = None,
    progress: Progress | None = None,
    **keywords: Any,
) -> Program:
    """Optimize, pack and lower a graph, or a function for arguments of the given types.

    Args:
        fn: a graph, or a function to trace on `specs`.
        specs, keywords: as for `trace`.
        target: "cpu", "gpu" or an `mx.Device`; by default MLX's default device.
        quantize: which float weights to quantize, and how.
        passes: instead of the default ones; `[]` runs the graph as written.
        parameters: as for `trace`.
        release: let float weights go once they are packed; by default True for a function, and
            False for a graph, which may be compiled again.
        progress: called with name, count and total while weights are packed.

    >>> import mlx.core as mx, qgraph as qg
    >>> w = mx.ones((64, 64))
    >>> program = qg.compile(lambda x: qg.quantized_matmul(x, w), qg.spec((1, 64)))
    >>> program(mx.ones((1, 64))).shape
    (1, 64)
    """
    if isinstance(fn, Graph):
        graph, release = fn, bool(release)
    else:
        graph, release = trace(fn, *specs, parameters=parameters, **keywords), release is not False
    plan = optimize(graph, target=target, quantize=quantize, passes=passes)
    return Program(None, plan, release=release, progress=progress)


def jit(
    fn: Callable[..., Any],
    *,
    target: Target | str | mx.Device | None = None,
    quantize: Quantize | None = None,
    passes: Sequence[Pass] | None = None,
    parameters: Sequence[int] = (),
    progress: Progress | None = None,
) -> Program:
    """A program that compiles `fn` at the first call, and once more for other input types.

    All of its specialisations share one packed copy of the weights.

    >>> import mlx.core as mx, qgraph as qg
    >>> double = qg.jit(lambda x: x * 2)
    >>> double(mx.array([1.0, 2.0])), double(mx.array(3))
    (array([2, 4], dtype=float32), array(6, dtype=int32))
    """
    where = as_target(target)
    constants = Constants()

    def specialise(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        with sharing(constants):
            graph = trace(fn, *args, parameters=parameters, **kwargs)
        return optimize(graph, target=where, quantize=quantize, passes=passes)

    return Program(specialise, progress=progress)
