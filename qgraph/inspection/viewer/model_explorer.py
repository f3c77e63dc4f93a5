"""Graphs for Google's Model Explorer: `graph.save("g.me.json")`, then `model-explorer g.me.json`.

The file is one graph collection of its JSON format (fields as in `model_explorer.graph_builder` of
the package ai-edge-model-explorer).  Layers and loop bodies are its layers.  Of a plan it holds the
graph after each pass; nodes keep their ids, so that two of them can be looked at side by side.
"""

from __future__ import annotations

import json
from typing import Any

from ...analysis.estimate import estimate
from ...ir.graph import Graph, Node, Value, is_scalar
from ...ir.loops import body_entries, body_inputs
from ...rewrite.history import History
from ..names import Names
from ..text import call_text
from .groups import Group, Groups
from .tracks import Tracks, stages

Json = dict[str, Any]


def to_model_explorer(shown: Graph | History) -> str:
    """The graph, or the graph after each pass of a plan, in Model Explorer's JSON.

    >>> import json, qgraph as qg
    >>> graph = qg.trace(lambda x: qg.tanh(x), qg.spec((4,)), name="f")
    >>> [node["label"] for node in json.loads(to_model_explorer(graph))["graphs"][0]["nodes"]]
    ['input', 'tanh', 'return']
    """
    if isinstance(shown, History):
        graphs = [
            _Writer(graph, tracks).graph(f"{number:02} {name}")
            for number, (name, graph, tracks) in enumerate(stages(shown))
        ]
        name = shown.graph.name
    else:
        name = shown.name
        graphs = [_Writer(shown, Tracks().first(shown)).graph(name)]
    return json.dumps({"label": name, "graphs": graphs}, indent=1)


class _Writer:
    def __init__(self, graph: Graph, tracks: dict[Node, int]) -> None:
        self._graph = graph
        self._tracks = tracks
        self._names = Names(graph)
        self._groups = Groups(graph, self._names)
        self._sources: dict[Value, Value] = {}
        """Of inputs of bodies that stand for an outer value."""
        self._given: dict[Node, Value] = {}
        """What an input of a body starts from."""
        for _, node in graph.walk():
            for entries, (_, shared) in zip(body_entries(node), body_inputs(node), strict=True):
                self._sources |= dict(shared)
                self._given |= {v.node: source for v, source in entries if source is not None}
        self._readers: dict[Value, Node] = {}
        """The first node that reads a value, be it in a body: a weight stands beside it."""
        for _, node in graph.walk():
            for value in () if node.bodies else node.inputs:
                self._readers.setdefault(self._source(value), node)

    def graph(self, name: str) -> Json:
        nodes = [self._input(value) for value in self._graph.inputs]
        for inside, node in self._graph.walk():
            if inside is not self._graph and node is inside.nodes[0]:
                nodes += [self._input(v) for v in inside.inputs if v not in self._sources]
            if node.op == "constant":
                if not is_scalar(node.output):
                    nodes.append(self._constant(node))
            else:
                nodes.append(self._node(node))
        nodes.append(self._results("return", self._graph.outputs, ""))
        return {"id": name, "nodes": nodes}

    def _space(self, group: Group | None) -> str:
        labels: list[str] = []
        while group is not None:
            labels.insert(0, group.label.replace("/", "\u2215"))
            group = group.parent
        return "/".join(labels)

    def _id(self, value: Value) -> str:
        return str(self._tracks[value.node])

    def _source(self, value: Value) -> Value:
        while value in self._sources:
            value = self._sources[value]
        return value

    def _edges(self, values: list[Value]) -> list[Json]:
        found = []
        for position, value in enumerate(values):
            value = self._source(value)
            if not is_scalar(value):
                found.append(
                    {
                        "sourceNodeId": self._id(value),
                        "sourceNodeOutputId": str(value.index),
                        "targetNodeInputId": str(position),
                    }
                )
        return found

    def _record(
        self, node: Node, label: str, space: str, inputs: list[Value], attrs: dict[str, str]
    ) -> Json:
        return {
            "id": str(self._tracks[node]),
            "label": label,
            "namespace": space,
            "attrs": [{"key": key, "value": text} for key, text in attrs.items() if text],
            "incomingEdges": self._edges(inputs),
            "outputsMetadata": [
                {
                    "id": str(value.index),
                    "attrs": [
                        {"key": "__tensor_tag", "value": self._names[value]},
                        {"key": "tensor_shape", "value": str(value.type)},
                    ],
                }
                for value in node.outputs
            ],
        }

    def _input(self, value: Value) -> Json:
        node = value.node
        given = [self._given[node]] if node in self._given else []
        attrs = {"name": self._names[value], "type": str(value.type)}
        return self._record(node, "input", self._space(self._groups.of.get(node)), given, attrs)

    def _constant(self, node: Node) -> Json:
        attrs = {"name": self._names[node.output], "type": str(node.output.type)}
        reader = self._readers.get(node.output)
        space = self._space(self._groups.of.get(reader)) if reader else ""
        return self._record(node, "constant", space, [], attrs)

    def _node(self, node: Node) -> Json:
        origin, cost = node.origin, estimate(node)
        attrs = {
            "call": call_text(node, self._names, limit=12),
            "kernel": node.kernel,
            "stream": "" if node.stream is None else str(node.stream),
            "runs": "" if node.stage == "run" else node.stage,
            "line": str(origin),
            "source": origin.source(),
            "made by": origin.made_by,
            "at least": str(cost),
        }
        loop = self._groups.loop.get(node)
        space = self._space(self._groups.of.get(node) if loop is None else loop)
        inputs = list(node.inputs) if loop is None else []
        for body in node.bodies:
            inputs += body.outputs
        return self._record(node, node.op, space, inputs, attrs)

    def _results(self, label: str, values: tuple[Value, ...], space: str) -> Json:
        edges = self._edges(list(values))
        return {"id": label, "label": label, "namespace": space, "incomingEdges": edges}
