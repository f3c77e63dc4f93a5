"""The order of the passes, and running them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx

from .errors import VerifyError
from .ir import Graph
from .ledger import recording
from .plan import Plan, PlanStep
from .quantize_config import Quantize
from .rewrite import recording_replacements
from .target import Target, as_target
from .verify import verify


class Pass(Protocol):
    """What the optimizer runs: a name, and a function from graph to graph.

    A pass that changes nothing returns the graph it was given.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, graph: Graph) -> Graph: ...


def default_passes(target: Target | None = None) -> list[Pass]:
    """The passes that `optimize` runs, in order.

    Raising comes first, as it knows an expansion only as MLX wrote it; a layer norm is one of the
    RMS norms of what it has centred, so it is raised before them.
    Fusing comes before hoisting: a `dequantize` of a constant does not change in a loop, but
    hoisting it would keep the dense weight alive.
    """
    from .passes import (
        AssignStreams,
        ChooseAttention,
        ChooseKernel,
        EliminateCommonSubexpressions,
        EliminateDeadCode,
        FoldConstants,
        FuseQuantizedMatmul,
        HoistQuantize,
        Legalize,
        MergeMatmuls,
        RaiseAttention,
        RaiseDequantize,
        RaiseLayerNorm,
        RaiseRmsNorm,
        RaiseRope,
        Simplify,
        SinkDequantize,
        WidenHalf,
    )

    return [
        EliminateDeadCode(),
        RaiseDequantize(),
        RaiseLayerNorm(target),
        RaiseRmsNorm(target),
        RaiseRope(target),
        RaiseAttention(target),
        FoldConstants(),
        Simplify(),
        EliminateCommonSubexpressions(),
        SinkDequantize(),
        FuseQuantizedMatmul(),
        EliminateDeadCode(),  # a dequantize that nothing reads any more still holds its weight
        MergeMatmuls(target),
        Legalize(target),
        ChooseAttention(target),
        ChooseKernel(target),
        WidenHalf(target),
        AssignStreams(target),
        HoistQuantize(),
        EliminateCommonSubexpressions(),
        EliminateDeadCode(),
    ]


def _quantizing(config: Quantize | None) -> list[Pass]:
    from .passes import EliminateDeadCode, QuantizeWeights

    return [] if config is None else [EliminateDeadCode(), QuantizeWeights(config)]


def _verify_after(name: str, graph: Graph) -> None:
    try:
        verify(graph)
    except VerifyError as error:
        raise VerifyError(f"the pass {name} broke {error.what}", origin=error.origin) from None


def optimize(
    graph: Graph,
    *,
    target: Target | str | mx.Device | None = None,
    quantize: Quantize | None = None,
    passes: Sequence[Pass] | None = None,
    check: bool = True,
    on_pass: Callable[[PlanStep], None] | None = None,
) -> Plan:
    """Run the passes over a graph.

    Args:
        graph: as traced or imported.
        target: "cpu", "gpu" or an `mx.Device`; by default MLX's default device.
        quantize: which float weights to quantize first, and how.
        passes: instead of the default ones; `[]` runs none.
        check: verify the graph after every pass.
        on_pass: called after each pass, with its step.

    Raises:
        VerifyError: a pass broke the graph; names the pass and the node.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: (qg.exp(x), qg.exp(x)), qg.spec((4,)), name="f")
    >>> print(qg.optimize(graph, target="cpu").graph.format(origins=False))
    graph f(x: f32[4]) -> (f32[4], f32[4])
      %0: f32[4] = exp(x)
      return %0, %0
    """
    where = as_target(target)
    source = graph
    if check:
        verify(graph)
    steps = []
    for run in [*_quantizing(quantize), *(default_passes(where) if passes is None else passes)]:
        start = time.perf_counter()
        with recording() as entries, recording_replacements() as replaced:
            after = run(graph)
        elapsed = 1000 * (time.perf_counter() - start)
        contract = getattr(run, "contract", "tolerance")
        step = PlanStep(run.name, graph, after, elapsed, tuple(entries), contract, replaced)
        if check and step.changed:
            _verify_after(run.name, after)
        steps.append(step)
        graph = after
        if on_pass is not None:
            on_pass(step)
    return Plan(graph, source, where, tuple(steps))
