"""`pack-results`: what regions give to regions alone is one array of each dtype.

The regions' sources, which take it apart by addresses, run in tests/kernels/test_grid_regions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.compiler.pipeline import default_passes
from qgraph.ir.graph import Graph, Node, Value, input_value
from qgraph.ir.loops import REGION
from qgraph.kernels.choice.tuner import Choice
from qgraph.kernels.matmul.tiled.product import Tiled
from qgraph.kernels.matmul.tiled.untiled import Untiled
from qgraph.passes import ChooseKernel, PackResults
from qgraph.tree import flatten
from tests.kernels.test_grid_regions import CUDA, Decoding, planned


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Tiled, "run", lambda self, *given: Untiled().run(*given))
    chosen = Choice(Tiled.name, "measured", 1.0)
    monkeypatch.setattr("qgraph.passes.choose_kernel.choose", lambda *_, **__: chosen)
    with mx.stream(mx.cpu):
        yield


def before_and_after(case: Decoding, turns: int = 3) -> tuple[Graph, Graph]:
    passes = [
        ChooseKernel(CUDA, min_flops=0) if p.name == "choose-kernel" else p
        for p in default_passes(CUDA)
        if p.name != "pack-results"
    ]
    fn = case.decode(case.weights(), turns)
    before = qg.optimize(qg.trace(fn, *case.inputs(), name="f"), target=CUDA, passes=passes).graph
    return before, PackResults()(before)


def scan_of(graph: Graph) -> Node:
    (found,) = [node for node in graph.nodes if node.op == "scan"]
    return found


def regions_of(loop: Node) -> list[Node]:
    return [n for n in loop.bodies[0].nodes if n.op == REGION]


def types(values: Any) -> list[str]:
    return [str(v.type) for v in values]


def test_text() -> None:
    """Cases 1 and 2: the keys and values of a layer's tail with what the next layer reads."""
    before, after = map(scan_of, before_and_after(Decoding()))
    tail, token = "bf16[1,2,3,64]", "bf16[1,1,512]"
    first, last = regions_of(before)
    assert types(first.outputs) == [tail, tail, "i32[3]", "bf16[1,1,256]", token]
    assert types(before.args["carried"]).count(tail) == 4

    first, last = regions_of(after)
    assert types(first.outputs) == ["i32[3]", f"bf16[{2 * 384 + 256 + 512}]"]
    assert types(last.outputs) == ["i32[3]", "bf16[1,1,256]", f"bf16[{2 * 384}]"]
    assert types(after.args["carried"]).count(tail) == 0
    assert first.outputs[1] in last.inputs
    text = str(last.bodies[0])
    assert "= split(packed) {indices_or_sections=(384, 768, 1024)}" in text
    assert "= concatenate(" in text


def test_numbers() -> None:
    """The same as without it, to the bit; tests/passes/test_tail_caches holds tails to float64."""
    case = Decoding()
    inputs = case.inputs()
    made = [qg.compile(g, passes=[], target="cpu")(*inputs) for g in before_and_after(case)]
    for one, other in zip(*(flatten(each)[0] for each in made), strict=True):
        assert mx.array_equal(one, other).item()


def test_in_a_nested_loop() -> None:
    case = Decoding()
    inner = case.decode(case.weights(), 3)

    def outer(x: Any, position: Any, caches: Any) -> Any:
        def turn(_: Any, carry: Any) -> Any:
            return inner(*carry)[0]

        return qg.fori_loop(0, 2, turn, (x, position, caches))

    graph = planned(outer, *case.inputs()).graph
    loops = [node for _, node in graph.walk() if node.op == "scan"]
    assert "bf16[768]" in types(loops[-1].args["carried"])


def test_what_a_loop_starts_from_an_input_stays() -> None:
    """Near miss 1: of the tails of a layer one starts from what the caller gives."""
    before, packed = before_and_after(Decoding())
    loop = scan_of(before)
    i = types(loop.args["carried"]).index("bf16[1,2,3,64]")
    start = input_value(loop.args["carried"][i].type, "tail")
    carried = [start if n == i else v for n, v in enumerate(loop.args["carried"])]
    graph = _with(before, loop, loop.replace(args={**loop.args, "carried": tuple(carried)}), start)
    after = scan_of(PackResults()(graph))
    assert types(after.args["carried"]).count("bf16[1,2,3,64]") == 1
    assert len(after.args["carried"]) == len(scan_of(packed).args["carried"]) + 1


def test_parts_that_do_not_end_at_16_bytes_stay() -> None:
    """Near misses 2 and 3: three positions are 12 bytes; four are 16, but alone of their dtype."""
    for turns in (3, 4):
        _, after = before_and_after(Decoding(), turns)
        assert types(scan_of(after).args["carried"]).count(f"i32[{turns}]") == 2


def test_regions_outside_of_loops_stay() -> None:
    """Near miss 3."""
    (body,) = scan_of(before_and_after(Decoding())[0]).bodies
    assert PackResults()(body) is body


def test_regions_of_other_back_ends_stay() -> None:
    """Near miss 4."""
    before, _ = before_and_after(Decoding())
    loop = scan_of(before)
    replace: dict[Value, Value] = {}
    nodes = []
    for node in loop.bodies[0].nodes:
        new = node.with_inputs(replace)
        nodes.append(new.replace(kernel="") if node.op == REGION else new)
        replace.update(zip(node.outputs, nodes[-1].outputs, strict=True))
    body = loop.bodies[0].replace(
        nodes=nodes, outputs=[replace.get(v, v) for v in loop.bodies[0].outputs]
    )
    graph = _with(before, loop, loop.replace(bodies=[body]))
    assert PackResults()(graph) is graph


def _with(graph: Graph, old: Node, new: Node, *more: Value) -> Graph:
    replace: dict[Value, Value] = dict(zip(old.outputs, new.outputs, strict=True))
    nodes = []
    for node in graph.nodes:
        made = new if node is old else node.with_inputs(replace)
        nodes.append(made)
        replace.update(zip(node.outputs, made.outputs, strict=True))
    outputs = [replace.get(v, v) for v in graph.outputs]
    return graph.replace(inputs=[*graph.inputs, *more], nodes=nodes, outputs=outputs)
