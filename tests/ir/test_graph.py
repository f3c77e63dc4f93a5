"""Graphs, nodes and values are immutable, and Python holds them to it."""

from __future__ import annotations

from typing import Any

import pytest

import qgraph as qg


def made() -> list[Any]:
    graph = qg.trace(lambda x: qg.exp(x) + 1, qg.spec((4,)))
    return [graph, graph.nodes[0], graph.outputs[0], graph.inputs[0]]


@pytest.mark.parametrize("which", range(4))
def test_nothing_can_be_set_or_deleted(which: int) -> None:
    thing = made()[which]
    names = ["name", "nodes"] if isinstance(thing, qg.Graph) else ["type", "origin", "kernel"]
    for name in [*names, "anything"]:
        with pytest.raises(AttributeError, match="immutable"):
            setattr(thing, name, None)
        with pytest.raises(AttributeError, match="immutable"):
            delattr(thing, name)


def test_the_arguments_of_a_node_cannot_be_changed() -> None:
    _, node, *_ = made()
    with pytest.raises(TypeError, match="does not support item assignment"):
        node.args["a"] = None


def test_a_node_is_not_changed_by_whoever_gave_its_arguments() -> None:
    _, node, *_ = made()
    args = dict(node.args)
    copy = node.replace(args=args)
    args.clear()
    assert dict(copy.args) == dict(node.args)
