"""JSON for Model Explorer, read with the schema of its own package."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.ir import Graph


def schema() -> ModuleType:
    """`model_explorer.graph_builder` alone: the package itself starts a web server's imports."""
    package = importlib.util.find_spec("model_explorer")
    if package is None or not package.submodule_search_locations:
        pytest.skip("pip install --no-deps ai-edge-model-explorer")
    path = Path(package.submodule_search_locations[0]) / "graph_builder.py"
    spec = importlib.util.spec_from_file_location("me_graph_builder", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def collection(text: str) -> Any:
    """The file as objects of that schema; a field it does not know is an error."""
    m = schema()
    data = json.loads(text)

    def pairs(items: list[dict[str, Any]]) -> list[Any]:
        return [m.KeyValue(**item) for item in items]

    def node(record: dict[str, Any]) -> Any:
        record = dict(record)
        record["attrs"] = pairs(record.get("attrs", []))
        record["incomingEdges"] = [m.IncomingEdge(**e) for e in record["incomingEdges"]]
        record["outputsMetadata"] = [
            m.MetadataItem(id=item["id"], attrs=pairs(item["attrs"]))
            for item in record.get("outputsMetadata", [])
        ]
        return m.GraphNode(**record)

    graphs = [m.Graph(id=g["id"], nodes=[node(n) for n in g["nodes"]]) for g in data["graphs"]]
    assert set(data) == {"label", "graphs"}
    return m.GraphCollection(label=data["label"], graphs=graphs)


def looped() -> Graph:
    w = mx.ones((64, 64))

    def step(x: qg.Tensor) -> qg.Tensor:
        h = qg.fori_loop(0, 4, lambda i, h: qg.tanh(qg.quantized_matmul(h, w)), x)
        return qg.exp(h) + 1

    return qg.trace(step, qg.spec((1, 64)), name="step")


def test_nodes_edges_and_layers_are_those_of_the_graph() -> None:
    (graph,) = collection(looped().to_model_explorer()).graphs
    by_label = {node.label: node for node in graph.nodes}
    assert by_label["quantized_matmul"].namespace == by_label["tanh"].namespace == "fori_loop[4]"
    assert by_label["fori_loop"].namespace == "fori_loop[4]"
    assert by_label["exp"].namespace == ""
    assert [e.sourceNodeId for e in by_label["tanh"].incomingEdges] == [
        by_label["quantized_matmul"].id
    ]
    assert [e.sourceNodeId for e in by_label["fori_loop"].incomingEdges] == [by_label["tanh"].id]
    product = by_label["quantized_matmul"].incomingEdges
    assert [e.sourceNodeOutputId for e in product] == ["0", "0", "1", "2"]
    attrs = {a.key: a.value for a in by_label["tanh"].attrs}
    assert attrs["line"].startswith("test_model_explorer.py:")
    assert "qg.tanh(" in attrs["source"]


@pytest.mark.parametrize("which", ["graph", "plan"])
def test_ids_are_unique_and_edges_end_at_nodes(which: str, tmp_path: Path) -> None:
    plan = qg.optimize(looped(), target="cpu")
    shown = plan if which == "plan" else plan.graph
    found = collection(shown.save(tmp_path / "g.me.json").read_text())
    for graph in found.graphs:
        outputs = {node.id: [m.id for m in node.outputsMetadata] for node in graph.nodes}
        assert len(outputs) == len(graph.nodes)
        for node in graph.nodes:
            for edge in node.incomingEdges:
                assert edge.sourceNodeOutputId in outputs[edge.sourceNodeId]


def test_of_a_plan_every_graph_is_there_and_nodes_keep_their_ids(tmp_path: Path) -> None:
    plan = qg.optimize(looped(), target="cpu")
    found = collection(plan.save(tmp_path / "plan.me.json").read_text())
    names = ["as written", *(step.name for step in plan.steps if step.changed)]
    assert [g.id for g in found.graphs] == [f"{i:02} {name}" for i, name in enumerate(names)]
    ids = [{node.label: node.id for node in g.nodes} for g in found.graphs]
    for label in ("tanh", "exp", "quantize", "quantized_matmul", "fori_loop"):
        assert len({each[label] for each in ids}) == 1
    packed = next(n for n in found.graphs[-1].nodes if n.label == "quantize")
    assert packed.namespace == "pack (once)"
