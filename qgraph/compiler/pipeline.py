"""The order of the passes, and running them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import mlx.core as mx

from ..analysis.verify import verify
from ..errors import InputError, TraceError, VerifyError
from ..ir.graph import Graph, Node
from ..kernels.tracers import Tracers
from ..mesh import Mesh
from ..quantization.config import Quantize
from ..rewrite.contracts import is_contract
from ..rewrite.history import Pass, PlanStep
from ..rewrite.ledger import collecting
from ..rewrite.rewriter import collecting_replacements
from ..target import Target, as_target, on_mesh
from .plan import Plan

Tune = Literal["table", "measure"]


def default_passes(
    target: Target | None = None,
    *,
    budget: int = 0,
    tune: Tune = "table",
    states: Sequence[tuple[int, int]] = (),
    activations: int | None = None,
) -> list[Pass]:
    """The passes that `optimize` runs, in order; arguments as there, activations as `Quantize` has.

    Raising comes first, as it knows an expansion only as MLX wrote it; a layer norm is one of the
    RMS norms of what it has centred, so it is raised before them.
    Fusing comes before hoisting: a `dequantize` of a constant does not change in a loop, but
    hoisting it would keep the dense weight alive.
    A graph is spread over a mesh when its products are fused; what comes after works on what a rank
    holds.
    """
    from ..passes import (
        AssignStreams,
        ChooseAttention,
        ChooseKernel,
        EliminateCommonSubexpressions,
        EliminateDeadCode,
        FoldConstants,
        FormGridRegions,
        FormRegions,
        FuseCache,
        FuseQuantizedMatmul,
        FuseResiduals,
        FuseSums,
        HoistQuantize,
        Legalize,
        MergeMatmuls,
        MergeViews,
        OverlapCollectives,
        PackResults,
        RaiseAttention,
        RaiseDequantize,
        RaiseLayerNorm,
        RaiseRmsNorm,
        RaiseRope,
        ReadPackedRows,
        RoundActivations,
        Shard,
        Simplify,
        SinkDequantize,
        SpellOutConvolutions,
        StoredScales,
        TailCaches,
        WidenHalf,
    )
    from ..passes.stored_scales import forms_regions

    regions: list[Pass] = []
    if not budget and tune == "table" and forms_regions(target):  # else kernels are asked for
        # What does not change leaves loops before they enter regions as a whole.
        regions = [StoredScales(target), HoistQuantize(), FormRegions(target)]
    return [
        EliminateDeadCode(),
        RaiseDequantize(),
        RaiseLayerNorm(target),
        RaiseRmsNorm(target),
        RaiseRope(target),
        RaiseAttention(target),
        SpellOutConvolutions(target),
        FoldConstants(),
        Simplify(),
        EliminateCommonSubexpressions(),
        SinkDequantize(),
        FuseQuantizedMatmul(),
        EliminateDeadCode(),  # a dequantize that nothing reads any more still holds its weight
        Shard(target, states=tuple(states)),
        MergeMatmuls(target),
        OverlapCollectives(target),
        Legalize(target),
        *([RoundActivations()] if activations else []),
        ChooseAttention(target),
        *regions,
        FuseCache(target),
        EliminateDeadCode(),  # the updates that were fused still read their caches
        TailCaches(),
        ChooseKernel(target, budget=budget, tune=tune == "measure"),
        ReadPackedRows(),
        WidenHalf(target),
        AssignStreams(target),
        MergeViews(),
        HoistQuantize(),
        EliminateCommonSubexpressions(),
        EliminateDeadCode(),
        FormGridRegions(target),
        PackResults(),
        FuseSums(target),
        FuseResiduals(target),
    ]


def _quantizing(config: Quantize | None) -> list[Pass]:
    from ..passes import EliminateDeadCode, FoldScales, QuantizeWeights

    if config is None:
        return []
    folding = [FoldScales(config.folded)] if config.folded else []
    return [EliminateDeadCode(), *folding, QuantizeWeights(config)]


def _chosen(
    passes: Sequence[Pass] | None,
    target: Target,
    budget: int,
    tune: Tune,
    states: Sequence[tuple[int, int]],
    activations: int | None,
) -> Sequence[Pass]:
    from ..passes import Shard

    if tune not in get_args(Tune):
        raise InputError(f"tune={tune!r}", hint=f"give one of {', '.join(get_args(Tune))}")
    if not isinstance(budget, int | float) or budget < 0:
        raise InputError(f"budget={budget!r}", hint="give the bytes that dense copies may take")
    if passes is None:
        return default_passes(
            target, budget=budget, tune=tune, states=states, activations=activations
        )
    if target.mesh is not None and all(run.name != "shard" for run in passes):
        passes = [Shard(target, states=tuple(states)), *passes]
    if activations:
        raise InputError(
            "Quantize(activations=8) belongs to the default passes",
            hint="put RoundActivations() where the products of your own passes are fused",
        )
    if budget or tune != "table":
        raise InputError(
            "budget and tune belong to the default passes",
            hint="give them to your own ChooseKernel: ChooseKernel(budget=..., tune=True)",
        )
    return _checked(passes)


def _checked(passes: Sequence[Pass]) -> Sequence[Pass]:
    if isinstance(passes, str) or not isinstance(passes, Sequence):
        raise InputError(f"passes={passes!r}", hint="give a list of passes, such as [Simplify()]")
    for one in passes:
        if isinstance(one, type):
            raise InputError(
                f"passes holds the class {one.__name__}", hint=f"{one.__name__}() is one"
            )
        if not callable(one) or not isinstance(getattr(one, "name", None), str):
            raise InputError(
                f"passes holds {one!r}, which is no pass",
                hint="a pass is called with a graph, returns one, and has a name",
            )
        if not is_contract(contract := getattr(one, "contract", "tolerance")):
            raise InputError(
                f"the pass {one.name} has the contract {contract!r}",
                hint="give 'exact', 'dtype-preserving' or 'tolerance 1e-3'",
            )
    return passes


def _verify_after(name: str, graph: Graph, checked: set[Node]) -> None:
    try:
        verify(graph, checked)
    except VerifyError as error:
        raise VerifyError(f"the pass {name} broke {error.what}", origin=error.origin) from None


def _refuse_tracers(graph: Graph) -> None:
    """Constants must not be what `mx.grad` and its like pass to a function: they are no weights."""
    nodes = [n for _, n in graph.walk() if n.op == "constant" and not n.args["data"].is_released]
    tracers = Tracers()

    def traced(nodes: Sequence[Node]) -> bool:
        return tracers.called_for([n.args["data"].array for n in nodes])

    if not traced(nodes) or tracers.called_for([mx.array(0)]):  # the latter without mx.compile
        return
    node = next(n for n in nodes if traced([n]))
    raise TraceError(
        f"{node.args['name'] or 'an array that the function captures'} is being transformed by "
        "MLX (grad, vmap, compile or their like), so it is no constant",
        hint="pass it as an argument",
        origin=node.origin,
    )


def optimize(
    graph: Graph,
    *,
    target: Target | str | mx.Device | None = None,
    mesh: Mesh | None = None,
    quantize: Quantize | None = None,
    passes: Sequence[Pass] | None = None,
    budget: int = 0,
    tune: Tune = "table",
    states: Sequence[tuple[int, int]] = (),
    check: bool = True,
    on_pass: Callable[[PlanStep], None] | None = None,
) -> Plan:
    """Run the passes over a graph.

    Args:
        graph: as traced or imported.
        target: "cpu", "gpu" or an `mx.Device`; by default MLX's default device.
        mesh: the ranks to spread the graph over.
        quantize: which float weights to quantize first, and how.
        passes: instead of the default ones; `[]` runs none.
        budget: bytes that dense copies of weights may take, where they make products faster.
        tune: "measure" times the kernels for the products of this graph on this machine and
            remembers the results; "table" asks what was measured before, here or for the package.
        states: numbers of an input and of the result that it is at the next call, such as a cache:
            on a mesh ranks may then keep parts of it.
        check: verify the graph after every pass.
        on_pass: called after each pass, with its step.

    Raises:
        VerifyError: a pass broke the graph; names the pass and the node.
        InputError: something of another kind than is asked for; or `passes` together with `budget`
            or `tune`, which are the passes' own.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: (qg.exp(x), qg.exp(x)), qg.spec((4,)), name="f")
    >>> print(qg.optimize(graph, target="cpu").graph.format(origins=False))
    graph f(x: f32[4]) -> (f32[4], f32[4])
      %0: f32[4] = exp(x)
      return %0, %0
    """
    if not isinstance(graph, Graph):
        raise InputError(
            f"optimize takes a graph, not one of type {type(graph).__name__}",
            hint="qg.trace(fn, ...) makes one; plan.source is that of a plan",
        )
    if quantize is not None and not isinstance(quantize, Quantize):
        raise InputError(f"quantize={quantize!r}", hint="give qg.Quantize(bits=4)")
    _refuse_tracers(graph)
    where = on_mesh(as_target(target), mesh)
    source = graph
    activations = None if quantize is None else quantize.activations
    runs = _chosen(passes, where, budget, tune, states, activations)
    checked: set[Node] = set()
    if check:
        verify(graph, checked)
    steps = []
    for run in [*_quantizing(quantize), *runs]:
        start = time.perf_counter()
        with collecting() as entries, collecting_replacements() as replaced:
            after = run(graph)
        if not isinstance(after, Graph):
            raise InputError(
                f"the pass {run.name} returned a {type(after).__name__}",
                hint="a pass returns a graph: the one it was given, where it changes nothing",
            )
        elapsed = 1000 * (time.perf_counter() - start)
        contract = getattr(run, "contract", "tolerance")
        step = PlanStep(run.name, graph, after, elapsed, tuple(entries), contract, replaced)
        if check and step.changed:
            _verify_after(run.name, after, checked)
        steps.append(step)
        graph = after
        if on_pass is not None:
            on_pass(step)
    return Plan(graph, source, where, tuple(steps))
