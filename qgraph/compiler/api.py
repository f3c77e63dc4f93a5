"""`compile` and `jit`: from a function or a graph to a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from ..errors import InputError, QGraphError, TraceError
from ..importer import from_mlx
from ..ir.graph import Graph, reachable
from ..mesh import Mesh
from ..quantization.config import Quantize
from ..rewrite.history import Pass
from ..runtime import artefact
from ..runtime.executable import Executable
from ..runtime.packing import PackCache, Progress
from ..target import Target, as_target, on_mesh
from ..tracing.captured import Captured
from ..tracing.tensor import Tensor, set_evaluator
from ..tracing.trace import sharing, trace
from ..tracing.weights import Watch
from .pipeline import Tune, optimize
from .plan import Plan
from .program import Program


def compile(
    fn: Graph | Callable[..., Any],
    *specs: Any,
    target: Target | str | mx.Device | None = None,
    mesh: Mesh | None = None,
    quantize: Quantize | None = None,
    passes: Sequence[Pass] | None = None,
    budget: int = 0,
    tune: Tune = "table",
    parameters: Sequence[int] = (),
    donate: Sequence[int] = (),
    share: Program | None = None,
    release: bool | None = None,
    progress: Progress | None = None,
    **keywords: Any,
) -> Program:
    """Optimize, pack and lower a graph, or a function for arguments of the given types.

    Args:
        fn: a graph, a function to trace on `specs`, or an `mlx.nn.Module`, which is imported.
        specs, keywords: as for `trace`.
        target: "cpu", "gpu" or an `mx.Device`; by default MLX's default device.
        mesh: the ranks to spread the graph over, as for `optimize`.
        quantize: which float weights to quantize, and how.
        passes: instead of the default ones; `[]` runs the graph as written.
        budget, tune: as for `optimize`.
        parameters: as for `trace`.
        donate: positions of arguments that are handed over: lists or dicts, with whatever is in
            them, which a call empties.  What it updates of them, such as caches, it then writes in
            place, where it would copy an array that its caller holds.
        share: a program made by `jit` whose packed weights this one shares, where both use the same
            arrays.  Float originals are held then: arrays are known by their identity, and the
            other program may need them for input types to come.
        release: let float weights go once they are packed; by default True for a function, and
            False for a graph, which may be compiled again.
        progress: called with name, count and total while weights are packed.

    >>> import mlx.core as mx, qgraph as qg
    >>> w = mx.ones((64, 64))
    >>> program = qg.compile(lambda x: qg.quantized_matmul(x, w), qg.spec((1, 64)))
    >>> program(mx.ones((1, 64))).shape
    (1, 64)
    """
    cache = _cache_of(share)
    if isinstance(fn, Graph):
        _refuse_specs(fn, specs, keywords, parameters)
        graph, release = fn, bool(release)
    else:
        # What is shared is held; without that, float weights go once they are packed.
        with nullcontext() if share is None else sharing(cache.constants):
            graph = _graph_of(fn, specs, keywords, parameters)
        release = release is not False and share is None
    plan = optimize(
        graph, target=target, mesh=mesh, quantize=quantize, passes=passes, budget=budget, tune=tune
    )
    return Program(
        None,
        plan,
        release=release,
        progress=progress,
        cache=cache,
        donate=donate,
        check=Watch(graph) if graph.weights else None,
    )


def jit(
    fn: Callable[..., Any],
    *,
    target: Target | str | mx.Device | None = None,
    mesh: Mesh | None = None,
    quantize: Quantize | None = None,
    passes: Sequence[Pass] | None = None,
    budget: int = 0,
    tune: Tune = "table",
    parameters: Sequence[int] = (),
    donate: Sequence[int] = (),
    share: Program | None = None,
    progress: Progress | None = None,
) -> Program:
    """A program that compiles `fn` at the first call, and once more for other input types.

    Each number of rows has a plan of its own, with the kernels that are fastest for it.  All share
    one packed copy of the weights, also with another program: one for a prompt, one that decodes.

    Args:
        fn: takes and returns trees of arrays; an `mlx.nn.Module` is imported.
        target, mesh, quantize, passes, budget, tune, parameters, donate, share, progress: as
            for `compile`.

    >>> import mlx.core as mx, qgraph as qg
    >>> double = qg.jit(lambda x: x * 2)
    >>> double(mx.array([1.0, 2.0])), double(mx.array(3))
    (array([2, 4], dtype=float32), array(6, dtype=int32))
    """
    if not callable(fn):
        raise InputError(f"jit takes a function, not a {type(fn).__name__}")
    where = on_mesh(as_target(target), mesh)
    cache = _cache_of(share)

    captured, watch = Captured(fn), Watch()

    def specialise(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        captured.check()
        with sharing(cache.constants):
            graph = _graph_of(fn, args, kwargs, parameters)
        watch.add(graph)
        return optimize(
            graph, target=where, quantize=quantize, passes=passes, budget=budget, tune=tune
        )

    return Program(
        specialise,
        parameters=parameters,
        progress=progress,
        cache=cache,
        donate=donate,
        check=watch,
    )


def _graph_of(
    fn: Callable[..., Any],
    specs: Sequence[Any],
    keywords: dict[str, Any],
    parameters: Sequence[int],
) -> Graph:
    """The graph of a function, or of an `mlx.nn.Module`, which calls MLX and so is imported."""
    if not isinstance(fn, Module):
        return trace(fn, *specs, parameters=parameters, **keywords)
    if parameters:
        raise InputError(
            "parameters= is not for a module, whose weights are constants",
            hint="write a function that takes the weights, with qg.call(module, x) for its parts",
        )
    return from_mlx(fn, *specs, **keywords)


def _refuse_specs(
    graph: Graph, specs: Sequence[Any], keywords: dict[str, Any], parameters: Sequence[int]
) -> None:
    """A graph has its types, and says itself which inputs are parameters."""
    if specs or keywords or parameters:
        raise InputError(
            f"{graph.name} is a graph, which has its types and parameters",
            hint="leave specs and parameters= out, or compile the function that it was traced of",
        )


def _cache_of(share: Program | None) -> PackCache:
    if share is None:
        return PackCache()
    if not isinstance(share, Program):
        raise InputError(f"share={type(share).__name__}", hint="give a program: qg.jit(...)")
    return share.cache


def evaluate(tensor: Tensor, target: Target | None = None) -> mx.array:
    """Compile and run the expression behind a lazy tensor."""
    nodes = reachable([tensor.value])
    for node in nodes:
        if node.op == "input":
            raise TraceError(
                f"this tensor depends on {node.args['name'] or 'an argument'}, whose elements "
                "are not known while tracing",
                hint="return it from the traced function and call the program",
            )
    nodes.sort(key=lambda node: node.serial)
    graph = Graph("expression", [], nodes, [tensor.value])
    plan = optimize(graph, target=target or as_target())
    executable = Executable(plan.graph, plan.target, PackCache(), release=False, progress=None)
    with executable.on_device():
        result = executable.run([])[0]
        mx.eval(result)
    return result


def load(folder: str | Path) -> Program:
    """The program that `Program.save` wrote.

    Raises:
        QGraphError: the folder holds no program, a damaged one, or one for a target that is not
            here; whatever the files hold, this is the error.

    >>> import tempfile, mlx.core as mx, qgraph as qg
    >>> program = qg.compile(lambda x: qg.tanh(x) + 1, qg.spec((4,)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = qg.load(program.save(folder))
    ...     mx.array_equal(again(mx.ones(4)), program(mx.ones(4))).item()
    True
    """
    graph, target = artefact.read(folder)
    plan = optimize(graph, target=target, passes=[], check=False)  # `read` has checked it
    try:
        return Program(None, plan)
    except (MemoryError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, QGraphError):
            raise
        raise QGraphError(
            f"{folder} holds a program that cannot be built here ({error})",
            hint="compile it again on this machine",
        ) from error


set_evaluator(evaluate)
