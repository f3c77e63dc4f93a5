"""States of which a rank holds a part from call to call, such as caches by heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ...ir.graph import Graph, Value, input_value, is_constant, reachable
from ...kernels.collectives import part
from ...mesh import Mesh
from ...types import TensorType
from .ops import is_part


class Part(NamedTuple):
    """What a rank holds of a value: so much of it along an axis, zeros beyond the value's end."""

    axis: int
    size: int
    whole: TensorType

    @property
    def type(self) -> TensorType:
        shape = list(self.whole.shape)
        shape[self.axis] = self.size
        return TensorType(tuple(shape), self.whole.dtype)

    def of(self, array: mx.array, mesh: Mesh) -> mx.array:
        """The part that this rank holds of a whole array; one that is a part stays."""
        if array.shape == self.type.shape:
            return array
        return part(array, self.axis, self.size, mesh.size, mesh.rank or 0)


def keeping_parts(graph: Graph, states: Sequence[tuple[int, int]]) -> tuple[Graph, dict[int, Part]]:
    """The graph that takes and gives a rank's parts of states, and which those are.

    Args:
        states: numbers of an input and the result that it is at the next call.

    Returns:
        The graph, and which part each input is that is no longer whole, by its number.
    """
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    replace: dict[Value, Value] = {}
    parts = {}
    for i, j in states:
        whole, joined = graph.inputs[i], graph.outputs[j].node
        taken = graph.users.get(whole, ())
        forms = {(n.args.get("axis"), n.args.get("size")) for n in taken if is_part(n)}
        if joined.op != "distributed.join" or whole in graph.outputs:
            continue
        axis, kept = joined.args["axis"], joined.operand("x")
        if forms != {(axis, kept.shape[axis])} or not all(map(is_part, taken)):
            continue
        inputs[i] = input_value(kept.type, whole.node.args["name"])
        replace.update((n.output, inputs[i]) for n in taken)
        outputs[j] = kept
        parts[i] = Part(axis, kept.shape[axis], whole.type)
    gone = {value.node for value in replace}
    nodes = []
    for node in graph.nodes:
        if node not in gone:
            nodes.append(node.with_inputs(replace))
            replace.update(zip(node.outputs, nodes[-1].outputs, strict=True))
    outputs = [replace.get(v, v) for v in outputs]
    read = set(reachable(outputs, stop=inputs))
    nodes = [node for node in nodes if node in read]
    return graph.replace(inputs=inputs, nodes=nodes, outputs=outputs), parts


def note_parts(graph: Graph) -> None:
    """Let constants know which parts are taken of them, for programs to come."""
    for node in graph.nodes:
        if is_part(node) and is_constant(whole := node.operand("x")):
            whole.node.args["data"].parts.add((node.args["axis"], node.args["size"]))
