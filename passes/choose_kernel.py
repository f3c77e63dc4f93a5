"""Carry out each quantized product in the way that is fastest for its shape on the target.

MLX has one fixed rule; often another way that it also has is several times faster.  The shapes and
the target are known here, so `qgraph.tuner.choose` picks among the kernels of `qgraph/kernels`: by
measurements cached on this machine, by the table that ships with the package, or by a cost model.

Rewrites:
    1. `quantized_matmul` with a weight that is constant or a parameter: `packed_matmul`, and, for a
       kernel that reads the weight in a layout of its own, `pack_weight`, which `hoist-quantize`
       moves to the pack or prepare step.
    2. the same weight read by several products with one kernel: packed once, by
       `eliminate-common-subexpressions`.
Leaves alone:
    1. products for which plain `qmm` is best, small ones, or those about which nothing is known.
    2. weights that change from call to call: packing them would cost more than it gives.
    3. weights in batches, and nodes whose device or stream the user chose.
    4. what other passes do and can do better, as they see the graph around: shards on several
       streams (`assign-streams`), and float32 for half precision (`widen-half`).
    5. kernels that run from the host, inside loops short enough to unroll.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.invariance import fixed_values
from qgraph.ir import Graph, Node, Value
from qgraph.kernels import Problem, candidates, kernel
from qgraph.ledger import Entry, record
from qgraph.rewrite import Visit, rewrite, setting
from qgraph.target import Target, as_target
from qgraph.tensor import Tensor, apply
from qgraph.tuner import Choice, choose

_NAME = "choose-kernel"
_LEFT = ("qmm", "f32+qmm")


@dataclass(frozen=True)
class ChooseKernel:
    """See the module.

    Args:
        target: device and machine.
        budget: bytes beyond its packed form that each weight may keep, for dense copies.
        exact: only kernels that give the same bits as `mx.quantized_matmul`.
        tune: measure what no cache holds; takes seconds a shape.
        min_flops: work below which plain `qmm` stays: such products take microseconds, and lie
            outside of what tables were measured on.
        gain: how much faster than plain a kernel must be to be taken.
    """

    target: Target | None = None
    budget: int = 0
    exact: bool = False
    tune: bool = False
    min_flops: float = 4e6
    gain: float = 1.1
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        target = self.target or as_target()
        fixed = fixed_values(graph)
        loops = {body for _, node in graph.walk() for body in node.bodies}

        def visitor(inner: Graph) -> Visit:
            return self._visitor(inner, target, fixed, inner in loops)

        return rewrite(graph, visitor, self.name)

    def _visitor(self, graph: Graph, target: Target, fixed: set[Value], in_loop: bool) -> Visit:
        places = iter(graph.nodes)

        def visit(node: Node) -> Sequence[Value] | None:
            old = next(places)
            if node.op != "quantized_matmul" or node.stream is not None or node.kernel:
                return None
            parts = [old.value(name) for name in ("w", "scales", "biases")]
            given = [v for v in parts if v is not None]
            if node.operand("w").ndim != 2 or not all(v in fixed for v in given):
                return None
            return self._choose(node, target, in_loop)

        return visit

    def _choose(self, node: Node, target: Target, in_loop: bool) -> Sequence[Value] | None:
        parts = [v for name in ("w", "scales", "biases") if (v := node.value(name)) is not None]
        problem = Problem.of(
            node.operand("x"),
            parts,
            target=target,
            group_size=node.args["group_size"],
            bits=node.args["bits"],
            mode=setting(node, "mode"),
            transpose=setting(node, "transpose"),
        )
        if problem.flops < self.min_flops:
            return None
        names = [
            name
            for name in candidates(problem, budget=self.budget, exact=self.exact)
            if not name.startswith("shard")
        ]
        choice = choose(problem, budget=self.budget, exact=self.exact, tune=self.tune, names=names)
        if in_loop and kernel(choice.kernel).host:
            choice = _without_host(choice)
        if choice.kernel in _LEFT or not self._is_worth_it(choice):
            return None
        record(Entry(_NAME, "chosen", f"{node.op} {problem}", node.origin, str(choice)))
        static = {"problem": problem, "kernel": choice.kernel}
        packed = [Tensor(v) for v in parts]
        if kernel(choice.kernel).layout:
            packed = apply("pack_weight", (packed,), static)
        y = apply("packed_matmul", (Tensor(node.operand("x")), packed), static)
        y.value.node.kernel = choice.kernel
        return [y.value]

    def _is_worth_it(self, choice: Choice) -> bool:
        plain = dict(choice.others).get("qmm")
        return plain is None or plain >= self.gain * choice.estimate_us


def _without_host(choice: Choice) -> Choice:
    """The best of the others that runs within a compiled stretch."""
    rest = [(name, us) for name, us in choice.others if not kernel(name).host]
    if not rest:
        return Choice("qmm", "default", choice.estimate_us)
    (name, us), *others = rest
    return Choice(name, choice.source, us, tuple(others))
