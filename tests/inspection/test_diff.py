"""Diffs by node identity: what a pass did, and nothing that it did not."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.analysis.matching import in_order, match
from qgraph.inspection.diff import diff_graphs
from qgraph.passes import EliminateCommonSubexpressions, FuseQuantizedMatmul, HoistQuantize

W = mx.ones((64, 64))
PARTS = mx.quantize(W, group_size=64, bits=4)


def product(x: Any) -> Any:
    return qg.tanh(x @ qg.dequantize(*PARTS, group_size=64, bits=4).T) + 1


def layers(x: Any) -> Any:
    for _ in range(5):
        x = product(x)
    return x


def loop(x: Any) -> Any:
    return qg.fori_loop(0, 9, lambda i, h: qg.tanh(qg.quantized_matmul(h, W)), x)


def plan(fn: Any, *passes: Any) -> qg.Plan:
    return qg.optimize(qg.trace(fn, qg.spec((1, 64))), passes=passes, target="cpu")


def lines(diff: Any) -> list[str]:
    return [re.sub(r"test_diff.py:\d+", "test_diff.py:N", line) for line in str(diff).splitlines()]


def test_a_fusion() -> None:
    diff = plan(product, FuseQuantizedMatmul()).diff("fuse-quantized-matmul")
    assert lines(diff) == [
        "fuse-quantized-matmul: 1 node out, 1 node in",
        "test_diff.py:N  return qg.tanh(x @ qg.dequantize(*PARTS, group_size=64, bits=4).T) + 1",
        "  - %2: f32[1,64] = matmul(x, %1)",
        "  + %2: f32[1,64] = quantized_matmul(x, @PARTS.0, @PARTS.1, @PARTS.2)"
        " {bits=4, group_size=64}   replaces %2",
        "    fused, case 1",
    ]
    (change,) = diff.changes
    assert [n.op for n in change.removed] == ["matmul"]
    assert [n.op for n in change.added] == ["quantized_matmul"]
    assert [e.decision for e in change.reasons] == ["fused"]


def test_what_was_only_rebuilt_does_not_show() -> None:
    """`tanh` and `add` after the product are new nodes, and the same operations."""
    made = plan(product, FuseQuantizedMatmul())
    same = match(made.source, made.graph)
    rebuilt = {old.op for old, new in same.items() if old is not new}
    assert rebuilt == {"tanh", "add"}


def test_alike_changes_are_shown_once() -> None:
    text = str(plan(layers, FuseQuantizedMatmul()).diff(0))
    assert text.startswith("fuse-quantized-matmul: 5 nodes out, 5 nodes in\n")
    assert "(4 more like it)" in text
    assert text.count("- %") == 1


def test_a_hoist_says_from_where_to_where() -> None:
    diff = plan(loop, HoistQuantize()).diff("hoist-quantize")
    text = lines(diff)
    assert text[0] == "hoist-quantize: 1 node moved"
    assert "      from the body of %h to pack (once)" in text
    assert any(line.strip().startswith("hoisted") for line in text)
    ((old, new),) = diff.changes[0].moved
    assert (old.stage, new.stage) == ("run", "pack")


def test_a_node_that_went_says_what_is_read_instead() -> None:
    def twice(x: Any) -> Any:
        return qg.exp(x) * qg.exp(x)

    diff = plan(twice, EliminateCommonSubexpressions()).diff()
    assert diff.summary() == "1 node out"
    assert lines(diff)[-1] == "  - %1: f32[1,64] = exp(x)   now %0"


def test_nothing_changed() -> None:
    diff = plan(qg.tanh, FuseQuantizedMatmul()).diff(0)
    assert diff.is_empty
    assert str(diff) == "fuse-quantized-matmul: nothing changed"


def test_refusals_have_their_reasons() -> None:
    wide = mx.quantize(mx.ones((128, 256)), group_size=64, bits=4)

    def awkward(x: Any) -> Any:
        return x @ qg.dequantize(*wide, group_size=64, bits=4).reshape(256, 128)

    graph = qg.trace(awkward, qg.spec((1, 256)))
    diff = qg.optimize(graph, passes=[FuseQuantizedMatmul()], target="cpu").diff(0)
    assert diff.is_empty
    (entry,) = diff.refused
    assert str(diff).splitlines()[1:] == [
        "left alone:",
        f"  {entry.origin}  {entry.what}: {entry.reason}",
    ]
    assert "groups" in entry.reason


def test_the_whole_plan() -> None:
    made = qg.optimize(qg.trace(loop, qg.spec((1, 64))), target="cpu")
    assert made.diff().before is made.source
    assert made.diff().after is made.graph
    with pytest.raises(qg.errors.InputError, match="no pass 'fuse' ran"):
        made.diff("fuse")


def test_two_graphs() -> None:
    before, after = (qg.trace(fn, qg.spec((4,))) for fn in (qg.exp, qg.sin))
    assert not diff_graphs(before, after).is_empty
    assert diff_graphs(before, before).is_empty
    assert len(diff_graphs(before, after).changes) == 1


def test_matching_keeps_repeated_layers_apart() -> None:
    made = plan(layers, FuseQuantizedMatmul())
    same = match(made.source, made.graph)
    order = [node for node, _ in in_order(made.graph)]
    places = [order.index(same[n]) for n, _ in in_order(made.source) if n.op == "tanh"]
    assert len(places) == 5
    assert places == sorted(places)


def test_colour_is_only_colour() -> None:
    diff = plan(loop, HoistQuantize()).diff(0)
    assert re.sub(r"\x1b\[\d+m", "", diff.format(colour=True)) == str(diff)


@pytest.mark.parametrize("fn", [layers, loop])
def test_a_graph_read_twice_is_the_same(fn: Any) -> None:
    text = qg.optimize(qg.trace(fn, qg.spec((1, 64))), target="cpu").graph.to_json()
    found = diff_graphs(qg.Graph.from_json(text), qg.Graph.from_json(text))
    assert found.is_empty
    assert found.summary() == "nothing changed"


def test_other_elements_under_one_name_are_another_constant() -> None:
    def graph(w: mx.array) -> qg.Graph:
        text = qg.trace(lambda x: qg.tanh(x @ qg.tensor(w, "w")), qg.spec((1, 64)), name="f")
        return qg.Graph.from_json(text.to_json())

    other = mx.array(W)
    other[3, 5] = 2
    assert diff_graphs(graph(W), graph(W)).is_empty
    assert not diff_graphs(graph(W), graph(other)).is_empty
