"""Running a plan's steps on sample inputs, to find the pass and the node that go wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .errors import ContractError
from .interpret import Env, Interpreter, Streams, unrolls
from .ir import Graph, Node, Value
from .ledger import Entry
from .lower import LoweredGraph
from .tree import flatten

if TYPE_CHECKING:
    from .plan import Plan, PlanStep

TOLERANCE = {mx.float16: 2e-2, mx.bfloat16: 1e-1}
"""Relative error allowed to a pass that promises one, by dtype; 1e-4 for the others."""

EXACT = "exact"


def check_plan(plan: Plan, inputs: Sequence[Any]) -> None:
    """Run the graph as written and after every pass; compare each with the one before.

    Raises:
        ContractError: names the first pass whose result differs from its input by more than it
            promised, and the first node that does.
    """
    arrays, _ = flatten((inputs, {}), static=True)
    device = plan.target.device
    before = _run(plan.source, arrays, device)
    for step in plan.steps:
        if not step.changed:
            continue
        after = _run(step.after, arrays, device)
        for old, new in zip(before, after, strict=True):
            error = difference(old, new, step.contract)
            if error:
                raise _broken(step, arrays, device, error)
        before = after


def _run(graph: Graph, arrays: Sequence[mx.array], device: mx.Device) -> list[mx.array]:
    from .packing import PackCache
    from .plan import Plan
    from .program import Executable
    from .target import as_target

    executable = Executable(
        Plan(graph, graph, as_target(device)), PackCache(), release=False, progress=None
    )
    given = dict(zip(graph.inputs, arrays, strict=True))
    prepared = executable.prepare([given[v] for v in executable.parameters])
    results = executable.run([*prepared, *(given[v] for v in executable.free)])
    mx.eval(results)
    return results


def allowance(contract: str, dtype: mx.Dtype) -> float:
    """The relative error that a contract allows.

    Contracts: "exact"; "dtype-preserving" and "tolerance", what a dtype is good for; and a number
    of their own, such as "tolerance 1e-3".

    >>> allowance("exact", mx.float32), allowance("tolerance 1e-3", mx.float32)
    (0.0, 0.001)
    """
    word, _, number = contract.partition(" ")
    if word not in (EXACT, "dtype-preserving", "tolerance"):
        raise ValueError(
            f"contract {contract!r}: give 'exact', 'dtype-preserving' or 'tolerance 1e-3'"
        )
    if word == EXACT:
        return 0.0
    return float(number) if number else TOLERANCE.get(dtype, 1e-4)


def difference(old: mx.array, new: mx.array, contract: str) -> str:
    """How two results differ beyond `contract`, in words; empty if they do not.

    >>> difference(mx.array([1.0]), mx.array([1.5]), "exact")
    'relative error 0.5, exact was promised'
    """
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{new.dtype} {tuple(new.shape)} instead of {old.dtype} {tuple(old.shape)}"
    if mx.array_equal(old, new, equal_nan=True):
        return ""
    if not mx.issubdtype(old.dtype, mx.inexact):
        return f"{int(mx.sum(old != new).item())} of {old.size} elements differ"  # type: ignore[arg-type]
    size = mx.linalg.norm(old.astype(mx.float32).flatten())
    away = mx.linalg.norm((new.astype(mx.float32) - old.astype(mx.float32)).flatten())
    error = float(away / mx.maximum(size, 1e-30))
    allowed = allowance(contract, old.dtype)
    if error <= allowed:
        return ""
    promised = "exact was promised" if not allowed else f"at most {allowed:g} was promised"
    return f"relative error {error:.2g}, {promised}"


def _broken(
    step: PlanStep, arrays: Sequence[mx.array], device: mx.Device, error: str
) -> ContractError:
    found = _first_node(step, step.before, step.after, arrays, device)
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
    same = entry.origin == node.origin and entry.what.split()[0] == node.op
    return entry.decision == "rewritten" and same


def _first_node(
    step: PlanStep, old: Graph, new: Graph, arrays: Sequence[mx.array], device: mx.Device
) -> tuple[Node, str] | None:
    """The first node of `old` whose replacement gives something else on the same inputs."""
    before, after = _values(old, arrays, device), _values(new, arrays, device)
    for node in old.nodes:
        for value in node.outputs:
            other = step.replaced.get(value, value)
            if value in before and other in after:
                error = difference(before[value], after[other], step.contract)
                if error:
                    return _inside(step, node, other.node, before, device) or (node, error)
    return None


def _inside(
    step: PlanStep, old: Node, new: Node, env: Mapping[Value, mx.array], device: mx.Device
) -> tuple[Node, str] | None:
    """Look into the first turn of a loop for the node that differs."""
    if old.op != "fori_loop" or new.op != "fori_loop" or not isinstance(old.args["lower"], int):
        return None
    inputs = [mx.array(old.args["lower"], mx.int32)]
    inputs += [env[v] for name in ("carried", "invariants") for v in old.args[name]]
    if len(new.bodies[0].inputs) != len(inputs):
        return None
    return _first_node(step, old.bodies[0], new.bodies[0], inputs, device)


def _values(graph: Graph, arrays: Sequence[mx.array], device: mx.Device) -> Env:
    """Every value of a graph, its bodies' apart."""
    env: Env = dict(zip(graph.inputs, arrays, strict=True))
    streams = Streams(device)
    for node in graph.nodes:
        if node.bodies and not unrolls(node):
            alone = Graph("node", node.inputs, [node], node.outputs)
            results = LoweredGraph(alone, {}, streams)([env[v] for v in node.inputs])
            env.update(zip(node.outputs, results, strict=True))
        else:
            Interpreter(streams).run(node, env)
    return env
