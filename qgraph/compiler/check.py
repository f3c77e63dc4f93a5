"""Running a plan's steps on sample inputs, to find the pass and the node that go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..analysis.meshes import in_one_process, is_spread
from ..errors import ContractError
from ..ir.graph import Graph, Node, Value, constant_value
from ..ir.loops import outermost
from ..ir.ops import setting
from ..quantization.steps import round_trip
from ..rewrite.contracts import EXACT, ROUNDED_WEIGHTS, coarsest, difference
from ..rewrite.history import History, PlanStep
from ..rewrite.ledger import Entry
from ..rewrite.rewriter import rewrite_each
from ..tree import flatten
from .first_difference import Search, pairs, values
from .signature import Signature, as_arrays


def check_plan(plan: History, inputs: Sequence[Any]) -> None:
    """Run the graph as written and after every pass; compare each with the one before.

    A graph that is spread over a mesh is run for all ranks, in this process.

    Raises:
        ContractError: names the first pass whose result differs from its input by more than it
            promised, and the first node that does.
    """
    leaves, form = flatten((inputs, {}), static=True)
    arrays = Signature.of(plan.source).arrange(form, as_arrays(leaves))
    device, mesh = plan.target.device, plan.target.mesh
    if mesh is not None:
        plan = replace(plan, steps=tuple(_in_one_process(s, mesh.size) for s in plan.steps))
    before = _run(plan.source, arrays, device)
    for step in plan.steps:
        if not step.changed:
            continue
        after = _run(step.after, arrays, device)
        compared, given = step, arrays
        if step.contract == ROUNDED_WEIGHTS:
            compared, given = _with_rounded_weights(step, arrays)
            before = _run(compared.before, given, device)
        dtype = coarsest(compared.before)
        for old, new in zip(before, after, strict=True):
            error = difference(old, new, compared.contract, dtype)
            if error:
                raise _broken(compared, given, device, error)
        before = after


def _in_one_process(step: PlanStep, ranks: int) -> PlanStep:
    """The step with graphs that run every rank, where a pass has spread them."""
    before, after = (
        in_one_process(g, ranks) if is_spread(g) else g for g in (step.before, step.after)
    )
    if before is step.before and after is step.after:
        return step
    return replace(step, before=before, after=after if step.changed else before, replaced={})


def _run(graph: Graph, arrays: Sequence[mx.array], device: mx.Device) -> list[mx.array]:
    env = values(graph, arrays, device)
    results = [env[v] for v in graph.outputs]
    del env  # what lies between is let go as it is computed
    mx.eval(results)
    return results


def _broken(
    step: PlanStep, arrays: Sequence[mx.array], device: mx.Device, error: str
) -> ContractError:
    dtype = coarsest(step.before)

    def differ(old: mx.array, new: mx.array) -> str:
        return difference(old, new, step.contract, dtype)

    search = Search(pairs(step.before, step.after, step.replaced), differ, device)
    found = search.first(step.before, step.after, arrays, arrays)
    if found is None:
        return ContractError(f"the pass {step.name} changes the result: {error}")
    node, error = found
    rule = next((e.reason for e in step.entries if _is_rule_of(e, node)), "")
    by = f" (by {rule})" if rule else ""
    return ContractError(
        f"the pass {step.name}{by} changes what {node.op} gives: {error}",
        hint=f"plan.diff({step.name!r}) shows what it made of that node",
        origin=node.origin,
    )


def _is_rule_of(entry: Entry, node: Node) -> bool:
    same = entry.origin == node.origin and entry.op == node.op
    return entry.decision == "rewritten" and same


def _with_rounded_weights(
    step: PlanStep, arrays: Sequence[mx.array]
) -> tuple[PlanStep, list[mx.array]]:
    """The step as if it had begun with rounded weights, and the arguments likewise.

    Raises:
        ContractError: a weight is further from its float values than a step of its group.
    """
    given = dict(zip(step.before.inputs, arrays, strict=True))
    rounded: dict[Value, mx.array] = {}
    source = outermost(step.after)
    for _, node in step.after.walk():
        if node.op == "quantize" and node.origin.made_by == step.name:
            weight = source.get(node.operand("w"), node.operand("w"))
            if weight not in given and weight.node.op != "constant":
                continue
            array = given[weight] if weight in given else weight.node.args["data"].array
            settings = {name: setting(node, name) for name in ("group_size", "bits", "mode")}
            rounded[weight], error = round_trip(array, **settings)
            if not error <= 1:
                raise ContractError(
                    f"the pass {step.name} moves a weight by {error:.2g} steps of its group, "
                    "1 was promised",
                    origin=node.origin,
                )
    constants = {
        v: constant_value(array, v.node.args["name"])
        for v, array in rounded.items()
        if v not in given
    }

    def visit(node: Node) -> list[Value] | None:
        new = constants.get(node.output) if node.op == "constant" else None
        return None if new is None else [new]

    before = rewrite_each(step.before, visit, "")
    arrays = [rounded.get(v, array) for v, array in given.items()]
    return replace(step, before=before, contract=EXACT, replaced={}), arrays
