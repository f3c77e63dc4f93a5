"""Tables of RoPE and causal attention: on a CPU computed once for all layers, the same bits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.passes import RaiseRope
from qgraph.runtime.positions import has_tables
from tests.support.raising import PASSES, ops, random

LAYERS = 3


def layers(x: Any, offset: Any, of: Any = mx) -> Any:
    for i in range(LAYERS):
        q = of.fast.rope(x, 8, traditional=i == 2, base=1e4, scale=1.0, offset=offset)
        k = of.fast.rope(x + i, 8, traditional=False, base=1e4, scale=1.0, offset=offset)
        x = of.fast.scaled_dot_product_attention(q, k, x, scale=0.3, mask="causal")
    return x


def primitives(program: qg.Program, *arrays: mx.array) -> Counter[str]:
    """What MLX is left to run."""
    found: Counter[str] = Counter()

    def note(record: dict[str, Any]) -> None:
        if record["type"] == "primitive":
            found[record["name"]] += 1

    (executable,) = program.executables
    mx.export_function(note, lambda *a: executable.run(a), *arrays)
    return found


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_an_offset_that_the_run_knows(dtype: mx.Dtype) -> None:
    x, offset = random(1, 2, 5, 8, dtype=dtype), mx.array(7)
    graph = qg.from_mlx(layers, x, offset)
    program = qg.compile(graph, target="cpu")
    assert ops(program.plan.graph).count("fast.rope") == 2 * LAYERS
    assert mx.array_equal(program(x, offset), layers(x, offset))
    found = primitives(program, x, offset)
    assert (found["Cos"], found["Sin"]) == (1, 1)
    assert not {"Exp", "GreaterEqual"} & set(found)  # these depend on nothing: they are constants
    assert primitives(qg.compile(graph, target="cpu", passes=[]), x, offset)["Cos"] == 1


def test_an_offset_known_while_compiling() -> None:
    x = random(1, 2, 5, 8)
    program = qg.compile(lambda x: layers(x, 7, of=qg), x, target="cpu")
    assert mx.array_equal(program(x), layers(x, 7))
    found = primitives(program, x)
    assert not {"Cos", "Sin", "Exp", "Arange", "GreaterEqual"} & set(found)
    assert found["Softmax"] == LAYERS


def test_in_a_loop_that_unrolls() -> None:
    x = random(1, 2, 5, 8)
    program = qg.compile(
        lambda x: qg.fori_loop(0, 2, lambda i, h: layers(h, 3, of=qg), x), x, target="cpu"
    )
    assert mx.allclose(program(x), layers(layers(x, 3), 3), rtol=1e-6, atol=1e-6)
    assert "Cos" not in primitives(program, x)


def test_in_a_loop_from_the_host() -> None:
    def fn(x: Any, n: Any) -> Any:
        return qg.fori_loop(0, n, lambda i, h: layers(h, i, of=qg), x)

    x = random(1, 2, 5, 8)
    expected = x
    for i in range(3):
        expected = layers(expected, i)
    result = qg.compile(fn, x, mx.array(3), target="cpu")(x, mx.array(3))
    assert mx.allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_frequencies_and_offsets_of_their_own() -> None:
    def fn(x: Any, offset: Any, f: Any, g: Any, of: Any = mx) -> Any:
        turn = {"traditional": False, "base": None, "scale": 1.0, "offset": offset}
        return of.fast.rope(x, 8, freqs=f, **turn) + of.fast.rope(x, 8, freqs=g, **turn)

    arrays = random(2, 2, 5, 8), mx.array([3, 9]), mx.arange(1.0, 5.0), mx.arange(2.0, 6.0)
    program = qg.compile(lambda *a: fn(*a, of=qg), *arrays, target="cpu")
    assert mx.array_equal(program(*arrays), fn(*arrays))
    assert primitives(program, *arrays)["Cos"] == 2


def test_what_has_tables() -> None:
    x = random(1, 2, 5, 8)
    graph = qg.optimize(qg.from_mlx(layers, x, mx.array(1)), passes=PASSES, target="cpu").graph
    nodes = [n for n in graph.nodes if n.op.startswith("fast.")]
    assert len(nodes) == 3 * LAYERS
    assert all(has_tables(n, mx.Device(mx.cpu)) for n in nodes)
    assert not any(has_tables(n, mx.Device(mx.gpu)) for n in nodes)
    assert not has_tables(nodes[0].replace(stream=1), mx.Device(mx.cpu))
    assert RaiseRope()(graph) is graph
