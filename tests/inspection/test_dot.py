"""DOT: what Graphviz and an independent parser read is the graph."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.ir import Graph

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pydot")


def product() -> Graph:
    w = mx.ones((64, 64))
    return qg.trace(
        lambda x: qg.tanh(qg.quantized_matmul(x, w) * 2), qg.spec((1, 64)), name='say "f"'
    )


def looped() -> Graph:
    w = mx.ones((64, 64))

    def turn(i: qg.Tensor, h: qg.Tensor) -> qg.Tensor:
        return qg.cond(i > 1, lambda a: qg.tanh(a @ w), lambda a: a + 1, h)

    return qg.trace(lambda x: qg.fori_loop(0, 64, turn, x), qg.spec((1, 64)), name="loop")


def parsed(graph: Graph):  # type: ignore[no-untyped-def]
    pydot = pytest.importorskip("pydot", reason="pydot reads DOT; pip install 'qgraph[test]'")
    (found,) = pydot.graph_from_dot_data(graph.to_dot())
    return found


def all_nodes(dot) -> dict[str, str]:  # type: ignore[no-untyped-def]
    """Labels by name, those of the boxes too."""
    found = {n.get_name(): (n.get("label") or "").strip('"') for n in dot.get_nodes()}
    for box in dot.get_subgraphs():
        found |= all_nodes(box)
    return {name: label for name, label in found.items() if name not in ("node", "edge")}


def test_nodes_edges_and_labels_are_those_of_the_graph() -> None:
    graph = product()
    dot = parsed(graph)
    labels = all_nodes(dot)
    by_op = {label.split("\\n")[0]: name for name, label in labels.items()}
    assert {"x", "quantized_matmul", "multiply", "tanh", "quantize"} <= set(by_op)
    edges = {(e.get_source(), e.get_destination()) for e in dot.get_edges()}
    assert (by_op["x"], by_op["quantized_matmul"]) in edges
    assert (by_op["quantized_matmul"], by_op["multiply"]) in edges
    assert (by_op["multiply"], by_op["tanh"]) in edges
    assert not any(label.startswith("2") for label in labels.values())  # numbers are no nodes
    assert "f32[1,64]" in labels[by_op["tanh"]]


def test_bodies_are_boxes_and_every_edge_ends_at_a_node() -> None:
    dot = parsed(looped())
    (loop,) = dot.get_subgraphs()
    assert loop.get("label").strip('"') == "body of fori_loop[64]"
    inner = [box.get("label").strip('"') for box in loop.get_subgraphs()]
    assert len(inner) == 2
    assert all(label.endswith("of cond") for label in inner)
    names = set(all_nodes(dot))
    for edge in dot.get_edges():
        assert {edge.get_source(), edge.get_destination()} <= names


def test_kernels_streams_and_stages_show() -> None:
    plan = qg.optimize(product(), target="cpu")
    text = plan.graph.to_dot()
    assert 'label="pack (once)"' in text
    for node in plan.graph.nodes:
        if node.kernel:
            assert f"kernel={node.kernel}" in text
        if node.stream is not None:
            assert f"stream={node.stream}" in text


def test_the_text_is_stable_and_saved(tmp_path: Path) -> None:
    graph = looped()
    place = graph.save(tmp_path / "g.dot")
    assert place.read_text() == graph.to_dot() + "\n"
    folder = qg.optimize(product(), target="cpu").dump(tmp_path / "plan")
    assert (folder / "00-as-written.dot").read_text().startswith("digraph")
    assert len(list(folder.glob("*.dot"))) == len(list(folder.glob("[0-9]*.json"))) + 1


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
@pytest.mark.parametrize("make", [product, looped])
def test_graphviz_draws_it(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    graph = qg.optimize(make(), target="cpu").graph
    place = graph.save(tmp_path / "g.dot")
    done = subprocess.run(["dot", "-Tsvg", str(place)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    ops = {node.op for _, node in graph.walk() if node.op != "constant"}
    assert all(f">{op}<" in done.stdout for op in ops)
