"""Prints of graphs: exact text, and the same from run to run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.analysis.estimate import Cost, estimate, total
from qgraph.inspection.fold import repeats

W = mx.ones((64, 64))


def layers(x: Any, count: int = 30) -> Any:
    for _ in range(count):
        x = qg.tanh(x @ W) + x
    return x


def step(x: Any) -> Any:
    return qg.fori_loop(0, 8, lambda i, h: qg.tanh(h @ W) * 2, x)


def of(fn: Callable[..., Any], *shape: int) -> qg.Graph:
    return qg.trace(fn, qg.spec(shape))


def test_a_graph_with_a_loop() -> None:
    assert of(step, 1, 64).format(origins=False) == (
        """\
graph step(x: f32[1,64]) -> f32[1,64]
  %h: f32[1,64] = fori_loop[8](x; @W)
    body(i: i32[], h: f32[1,64]; @W)
      %0: f32[1,64] = matmul(h, @W)
      %1: f32[1,64] = tanh(%0)
      %2: f32[1,64] = multiply(%1, 2)
      yield %2
  return %h"""
    )


def test_origins_stand_in_one_column() -> None:
    lines = str(of(step, 1, 64)).splitlines()
    columns = {line.index("test_text.py:") for line in lines if "test_text.py" in line}
    assert len(columns) == 1


def test_print_is_the_same_from_trace_to_trace() -> None:
    assert str(of(step, 1, 64)) == str(of(step, 1, 64)) == of(step, 1, 64).format()


def test_folded_layers() -> None:
    assert of(layers, 1, 64).format(fold=True, origins=False) == (
        """\
graph layers(x: f32[1,64]) -> f32[1,64]
  30 × block:
    %0: f32[1,64] = matmul(x, @W)
    %1: f32[1,64] = tanh(%0)
    %2: f32[1,64] = add(%1, x)
    ... 29 more like it, up to %89
  return %89"""
    )


def blocks(skip: bool) -> Callable[[Any], Any]:
    """Two blocks; with `skip` the second adds something else than it began with."""

    def fn(x: Any) -> Any:
        start = extra = x
        for _ in range(2):
            t = qg.tanh(start)
            u = qg.exp(t) * t
            start, extra = (u + start) + extra, u if skip else None
            extra = start if extra is None else extra
        return start

    return fn


def test_blocks_fold_only_where_they_read_alike() -> None:
    assert [run.count for run in repeats(of(blocks(skip=False), 4).nodes)] == [2]
    assert all(run.count == 1 for run in repeats(of(blocks(skip=True), 4).nodes))


def test_layers_with_other_settings_do_not_fold() -> None:
    def softmaxes(x: Any) -> Any:
        for i in range(6):
            x = qg.softmax(x + 1, axis=i % 2)
        return x

    runs = repeats([n for n in of(softmaxes, 4, 4).nodes if n.op != "constant"])
    assert [(run.size, run.count) for run in runs] == [(4, 3)]


SELECTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"op": "tanh"}, ["%1", "%4", "%7"]),
    ({"op": "t*h"}, ["%1", "%4", "%7"]),
    ({"name": "W"}, ["%0", "%3", "%6"]),
    ({"name": "%5"}, ["%5"]),
    ({"feeds": "%4", "depth": 1}, ["%3", "%4"]),
    ({"feeds": "%4"}, ["%0", "%1", "%2", "%3", "%4"]),
    ({"reads": "%5"}, ["%5", "%6", "%7", "%8"]),
    ({"reads": "%5", "op": "tanh"}, ["%7"]),
    ({"feeds": "x"}, []),
    ({"line": "test_text.py"}, [f"%{i}" for i in range(9)]),
    ({"line": "other.py"}, []),
]


@pytest.mark.parametrize(("options", "shown"), SELECTIONS, ids=[str(o) for o, _ in SELECTIONS])
def test_selection(options: dict[str, Any], shown: list[str]) -> None:
    text = of(lambda x: layers(x, 3), 1, 64).format(**options)
    assert re.findall(r"^ +(%\d+):", text, re.M) == shown
    missing = sum(map(int, re.findall(r"\.\.\. (\d+) not shown", text)))
    assert missing + len(shown) == 9


def test_a_line_is_chosen_by_its_number() -> None:
    graph = of(step, 1, 64)
    line = graph.nodes[-1].origin.line
    assert graph.format(line=str(line)) == graph.format(line=f"test_text.py:{line}")
    assert "tanh" in graph.format(line=str(line))


def test_what_feeds_a_value_in_a_loop_comes_from_outside_too() -> None:
    def fn(x: Any) -> Any:
        start = qg.exp(x)
        other = qg.sin(x)
        return qg.fori_loop(0, 4, lambda i, h: qg.tanh(h) + other, start) + qg.cos(x)

    text = of(fn, 4).format(feeds="%h", origins=False)
    assert "exp(x)" in text
    assert "sin(x)" in text
    assert "tanh(h)" in text
    assert "cos(x)" not in text


def test_an_unknown_name_is_an_error_that_helps() -> None:
    with pytest.raises(qg.errors.InputError, match="no value is called '%99'") as caught:
        of(lambda x: layers(x, 3), 1, 64).format(feeds="%99")
    assert "did you mean" in caught.value.hint


def test_limit_cuts_lists() -> None:
    graph = qg.trace(lambda xs: [x + 1 for x in xs], [qg.spec((2,))] * 5, name="f")
    assert graph.format(limit=2).splitlines()[0] == (
        "graph f(xs.0: f32[2], xs.1: f32[2], ... 3 more) -> (f32[2], f32[2], ... 3 more)"
    )
    assert "return %0, %1, ... 3 more" in graph.format(limit=2)


def test_colours_change_nothing_but_colours() -> None:
    graph = of(step, 1, 64)
    coloured = graph.format(colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == graph.format()


def test_notes_stand_beside_their_nodes() -> None:
    graph = of(layers, 1, 64)
    text = graph.format(notes={graph.nodes[1]: "hot"})
    assert next(line for line in text.splitlines() if "hot" in line).endswith("hot")


# Costs, against counts by hand.

COSTS: list[tuple[str, Callable[[Any], Any], tuple[int, ...], Cost]] = [
    ("matmul", lambda x: x @ W, (2, 64), Cost(4 * (2 * 64 + 64 * 64 + 2 * 64), 2 * 2 * 64 * 64)),
    ("tanh", qg.tanh, (4, 8), Cost(2 * 4 * 32, 32)),
    ("reshape", lambda x: x.reshape(8, 4), (4, 8), Cost(0, 0)),
    ("multiply", lambda x: x * x, (4, 8), Cost(2 * 4 * 32, 32)),
    ("take", lambda x: qg.take(x, mx.array([1]), axis=0), (100, 8), Cost(4 * 8 * 2 + 4, 0)),
    ("sum", lambda x: x.sum(), (4, 8), Cost(4 * 33, 32)),
    ("slice_update", lambda x: qg.slice_update(x, x[:1], mx.array([0]), axes=(0,)), (9, 8),
     Cost(2 * 4 * 8, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "fn", "shape", "cost"), COSTS, ids=[row[0] for row in COSTS])
def test_costs(op: str, fn: Callable[[Any], Any], shape: tuple[int, ...], cost: Cost) -> None:
    (node,) = [n for n in of(fn, *shape).nodes if n.op == op]
    found = estimate(node)
    assert found.nbytes == cost.nbytes
    if op != "slice_update":
        assert found.flops == cost.flops


def test_cost_of_a_quantized_product_is_that_of_its_packed_weight() -> None:
    parts = mx.quantize(W, group_size=64, bits=4)
    graph = of(lambda x: qg.quantized_matmul(x, *parts), 1, 64)
    cost = estimate(graph.nodes[-1])
    assert cost.nbytes == sum(p.nbytes for p in parts) + 2 * 4 * 64
    assert cost.flops == 2 * 64 * 64


@pytest.mark.parametrize(("products", "read"), [(2, 2), (7, 5)])
def test_a_gathered_product_reads_the_matrices_that_it_picks(products: int, read: int) -> None:
    experts = mx.quantize(mx.ones((5, 64, 64)))
    ids = mx.zeros((products,), mx.uint32)
    around = 4 * products * (64 + 64 + 1)
    of_one = sum(part.nbytes for part in experts) // 5
    graph = of(lambda x: qg.gather_qmm(x, *experts, rhs_indices=ids), products, 1, 64)
    assert estimate(graph.nodes[-1]).nbytes == around + read * of_one
    dense = of(lambda x: qg.gather_mm(x, mx.ones((5, 64, 64)), None, ids), products, 1, 64)
    assert estimate(dense.nodes[-1]).nbytes == around + read * 4 * 64 * 64


def test_costs_of_loops_count_their_turns() -> None:
    once = sum(
        (estimate(n) for n in of(step, 1, 64).nodes[-1].bodies[0].nodes if n.op != "constant"),
        Cost(),
    )
    assert total(of(step, 1, 64)) == once.times(8)
    unknown = qg.trace(
        lambda x: qg.while_loop(lambda h: h.sum() < 9, lambda h: h + 1, x), qg.spec((4,))
    )
    assert not total(unknown).exact
    assert ">=" in unknown.format(costs=True)


def test_ten_thousand_nodes() -> None:
    """`python -m benchmarks.text` has the times; here the text is right at that size."""
    graph = of(lambda x: layers(x, 3400), 1, 64)
    assert graph.count() == 10_200
    assert len(str(graph).splitlines()) == 10_202
    assert len(graph.format(fold=True).splitlines()) == 7
    assert len(graph.format(feeds="%900", costs=True).splitlines()) == 903  # 901 nodes, head, gap
