"""Rewriting: which nodes a visit gets, and which types are inferred again."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.analysis.verify import verify
from qgraph.errors import VerifyError
from qgraph.ir.graph import Graph, Node, input_value
from qgraph.rewrite.rewriter import Visit, rewrite, rewrite_each


def looped(x: Any) -> Any:
    return qg.fori_loop(0, 3, lambda i, h: qg.exp(h) + 1, qg.abs(x))


GRAPH = qg.trace(looped, qg.spec((4,)), name="f")


def as_tanh(node: Node) -> Any:
    return node.replace(op="tanh").outputs


def test_a_visit_gets_the_ops_that_it_is_for_in_bodies_too() -> None:
    seen = []

    def visit(node: Node) -> Any:
        seen.append(node.op)
        return as_tanh(node)

    made = rewrite_each(GRAPH, visit, "to-tanh", ("exp", "sin"))
    assert seen == ["exp"]
    assert [n.op for n in made.nodes[-1].bodies[0].nodes if n.op != "constant"] == ["tanh", "add"]
    assert [n.op for n in made.nodes] == ["abs", "fori_loop"]


def test_a_graph_without_the_ops_is_returned_as_it_was() -> None:
    assert rewrite_each(GRAPH, as_tanh, "to-tanh", ("sin",)) is GRAPH


def test_a_visitor_may_pass_over_a_graph_and_not_over_its_bodies() -> None:
    def visit(node: Node, _: Node) -> Any:
        return as_tanh(node) if node.op == "exp" else None

    def visitor(graph: Graph) -> Visit | None:
        return None if graph is GRAPH else visit

    made = rewrite(GRAPH, visitor, "to-tanh")
    assert made.nodes[0] is GRAPH.nodes[0]
    assert "tanh" in made.nodes[-1].bodies[0].ops
    assert rewrite(GRAPH, lambda _: None, "nothing") is GRAPH


def test_types_that_mlx_gave_hold_for_values_of_the_same_types() -> None:
    node = qg.trace(lambda a, b: a + b, qg.spec((4,)), qg.spec((4,))).nodes[0]
    same, other = (input_value(qg.spec((4,), dtype).type) for dtype in (mx.float32, mx.int32))
    assert node.inferred
    assert node.with_inputs({node.inputs[0]: same}).inferred
    assert node.replace(kernel="", stage="run").inferred
    assert not node.with_inputs({node.inputs[0]: other}).inferred


@pytest.mark.parametrize("wrong", ["args", "types", "op"])
def test_what_is_written_by_hand_is_inferred_again(wrong: str) -> None:
    graph = qg.trace(lambda a: qg.sum(a, axis=0), qg.spec((4, 2)), name="f")
    changed: dict[str, Any] = {
        "args": {**graph.nodes[0].args, "axis": 1},
        "types": [qg.spec((3,)).type],
        "op": "cumsum",
    }
    node = graph.nodes[0].replace(**{wrong: changed[wrong]})
    assert not node.inferred
    with pytest.raises(VerifyError, match=r"MLX gives \[f32\["):
        verify(graph.replace(nodes=[node], outputs=node.outputs))


def test_an_operand_of_another_type_is_found() -> None:
    graph = qg.trace(lambda a: qg.exp(a), qg.spec((4,)), name="f")
    other = input_value(qg.spec((5,)).type)
    node = graph.nodes[0].with_inputs({graph.inputs[0]: other})
    with pytest.raises(VerifyError, match=r"says it gives \[f32\[4\]\], MLX gives \[f32\[5\]\]"):
        verify(graph.replace(inputs=[other], nodes=[node], outputs=node.outputs))
