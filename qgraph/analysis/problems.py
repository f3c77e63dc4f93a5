"""The problem that a quantized product of a graph is to the kernels."""

from __future__ import annotations

from ..ir.graph import Node
from ..ir.ops import setting
from ..kernels import Problem, plain
from ..kernels.choice.tuner import estimate as kernel_estimate
from ..target import Target


def problem_of(node: Node, target: Target) -> Problem:
    """The problem that a `quantized_matmul` or one matrix of a `gather_qmm` is to a target."""
    return Problem.of(
        node.operand("x"),
        [v for name in ("w", "scales", "biases") if (v := node.value(name)) is not None],
        target=target,
        **{name: setting(node, name) for name in ("group_size", "bits", "mode", "transpose")},
    )


def product_problem(node: Node, target: Target) -> Problem | None:
    """The problem that a quantized product is to the tuner; None for any other op."""
    if node.op == "packed_matmul":
        chosen: Problem = node.args["problem"]
        return chosen
    if node.op != "quantized_matmul":
        return None
    return problem_of(node, target)


def product_estimate(node: Node, target: Target) -> float | None:
    """Seconds that the tables of kernels give a quantized product, where they know it."""
    problem = product_problem(node, target)
    if problem is None:
        return None
    microseconds = kernel_estimate(node.kernel or plain(problem), problem)
    return None if microseconds is None else microseconds * 1e-6
