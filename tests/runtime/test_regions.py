"""Regions as programs run them: products, attention, loops, caches, and random graphs."""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings

import qgraph as qg
from qgraph.passes import FormRegions, StoredScales
from qgraph.rewrite.regions import inlined
from qgraph.runtime.regions.cpu.table import address
from qgraph.runtime.regions.run import bound
from qgraph.target import as_target
from tests.runtime.test_region_ops import agree, as_list, both_ways, error
from tests.support import region_cases as cases
from tests.support.arrays import to_numpy
from tests.support.compiler import needs_compiler
from tests.support.fusion import FORMATS, not_compiled
from tests.support.in_numpy import InNumPy
from tests.support.random_graphs import ROWS, K, parameters, programs, run

pytestmark = needs_compiler
CPU = as_target("cpu")


def with_regions() -> list[qg.Pass]:
    """The default passes, which form regions however little they save."""
    everywhere = FormRegions(CPU, everywhere=True)
    return [everywhere if p.name == "form-regions" else p for p in qg.default_passes(CPU)]


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_packed_products(form: str, dtype: mx.Dtype, rows: int) -> None:
    w = cases.numbers(40, 128, seed=1, dtype=dtype)
    packed = mx.quantize(w, **FORMATS[form])
    x = cases.numbers(rows, 128, dtype=dtype)
    dense = to_numpy(mx.dequantize(*packed, **FORMATS[form])).astype(np.float64)
    exact = to_numpy(x).astype(np.float64) @ dense.T
    agree(lambda x: qg.quantized_matmul(x, *packed, **FORMATS[form]), x, exact=exact)


@pytest.mark.parametrize("form", ["affine-4-32", "mxfp4"])
def test_packed_products_by_columns(form: str) -> None:
    packed = mx.quantize(cases.numbers(64, 128, seed=1), **FORMATS[form])
    agree(lambda x: qg.quantized_matmul(x, *packed, **FORMATS[form], transpose=False),
          cases.numbers(3, 64))  # fmt: skip


def test_scales_are_read_as_they_are_stored() -> None:
    packed = mx.quantize(cases.numbers(64, 128, seed=1).astype(mx.float16))
    wide = [packed[0], *(p.astype(mx.float32) for p in packed[1:])]

    def product(x: Any) -> Any:
        w, *scales = map(qg.tensor, packed)
        return qg.quantized_matmul(x, w, *(s.astype(mx.float32) for s in scales))

    x = cases.numbers(3, 128)
    program = qg.compile(
        product, x, target="cpu", passes=[StoredScales(CPU), FormRegions(CPU, everywhere=True)]
    )
    (region,) = [n for n in program.plan.graph.nodes if n.op == "region"]
    assert {v.dtype for v in region.inputs} == {mx.float32, mx.uint32, mx.float16}
    assert error(program(x), to_numpy(mx.quantized_matmul(x, *wide))) < 1e-6


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("form", ["affine-4-32", "mxfp4"])
def test_experts(form: str, rows: int) -> None:
    w = cases.numbers(4, 48, 64, seed=1)
    packed = mx.quantize(w, **FORMATS[form])
    x = cases.numbers(rows, 1, 1, 64)
    picked = mx.random.randint(0, 4, (rows, 2), key=mx.random.key(1)).astype(mx.uint32)
    agree(lambda x, i: qg.gather_qmm(x, *packed, rhs_indices=i, **FORMATS[form]), x, picked)
    agree(lambda x, i: qg.gather_mm(x, qg.swapaxes(qg.tensor(w), 1, 2), rhs_indices=i), x, picked)
    left = mx.array([[2, 0], [1, 1]], mx.uint32) % rows
    agree(
        lambda x, i, j: qg.gather_qmm(
            x[:, 0], *packed, lhs_indices=j, rhs_indices=i, **FORMATS[form]),
        x, picked[:1, :1], left,
    )  # fmt: skip


@pytest.mark.parametrize("lead", [(), (6,), (3, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_matrices_are_picked_of_stacks_along_several_axes(
    lead: tuple[int, ...], turned: bool
) -> None:
    w = cases.numbers(*lead, 16, 64, seed=1) if turned else cases.numbers(*lead, 64, 16, seed=1)
    x = cases.numbers(2, 3, 5, 64)
    left, right = mx.array([[0, 5], [1, 1], [4, 2]]), mx.array([[5], [0], [3]]) * bool(lead)
    matrices = to_numpy(w.swapaxes(-1, -2) if turned else w).reshape(-1, 64, 16).astype(np.float64)
    exact = to_numpy(x).reshape(6, 5, 64)[np.array(left)] @ matrices[np.array(right)]

    def product(x: Any, w: Any, i: Any, j: Any) -> Any:
        return qg.gather_mm(x, w.swapaxes(-1, -2) if turned else w, i, j)

    agree(product, x, w, left.astype(mx.uint32), right.astype(mx.uint32), exact=exact)


def test_words_and_samples_are_those_of_mlx() -> None:
    def draw(key: Any, logits: Any) -> Any:
        now, later = qg.split(qg.random.split(key), 2)
        token = qg.random.categorical(logits, key=now.reshape(2))
        return token, later, qg.random.uniform(shape=(3, 5), key=key)

    for seed in range(5):
        pairs = both_ways(draw, mx.random.key(seed), cases.numbers(4, 50, seed=seed))
        for ours, theirs in pairs:
            np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=1e-6)


MASKS = {
    "none": None,
    "causal": "causal",
    "bool": mx.array(np.tril(np.ones((6, 11), bool), 5)),
    "added": cases.numbers(4, 6, 11, seed=5),
    "integers": mx.array(np.arange(2 * 11).reshape(2, 1, 1, 11) % 3),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_attention(mask: str, dtype: mx.Dtype) -> None:
    q = cases.numbers(2, 4, 6, 16, dtype=dtype)
    k, v = (cases.numbers(2, 2, 11, 16, seed=i, dtype=dtype) for i in (1, 2))
    found: Any = MASKS[mask]
    if mask == "added":
        found = found.astype(dtype)
    if isinstance(found, mx.array):
        agree(cases.attention(), q, k, v, found)
    else:
        agree(cases.attention(mask=found), q, k, v)


SHAPES = [(6, 11), (1, 11), (1, 1, 11), (2, 1, 1, 11), (1, 4, 6, 11), (2, 1, 6, 1), (2, 4, 6, 11)]


@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_of_any_shape(shape: tuple[int, ...], boolean: bool) -> None:
    """Broadcast over batch, heads, queries or keys; with sinks too."""
    q = cases.numbers(2, 4, 6, 16)
    k, v = (cases.numbers(2, 2, 11, 16, seed=i) for i in (1, 2))
    mask = cases.numbers(*shape, seed=7)
    if boolean:
        mask = mask > -1
    exact = _attended(*(to_numpy(a).astype(np.float64) for a in (q, k, v)), to_numpy(mask))
    agree(cases.attention(), q, k, v, mask, exact=exact)
    agree(lambda q, k, v, m, s: qg.fast.scaled_dot_product_attention(
        q, k, v, scale=0.25, mask=m, sinks=s), q, k, v, mask, cases.numbers(4, seed=3))  # fmt: skip


def _attended(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = 0.25 * q @ np.repeat(k, 2, axis=1).swapaxes(-1, -2)
    scores = np.where(mask, scores, -1e30) if mask.dtype == bool else scores + mask
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True) @ np.repeat(v, 2, axis=1)


def test_attention_with_sinks_over_transposed_heads() -> None:
    def attend(x: Any, sinks: Any) -> Any:
        heads = x.reshape(1, 6, 4, 16).transpose(0, 2, 1, 3)
        y = qg.fast.scaled_dot_product_attention(
            heads, heads[:, :2], heads[:, 2:], scale=0.25, mask="causal", sinks=sinks
        )
        return y.transpose(0, 2, 1, 3).reshape(1, 6, 64)

    agree(attend, cases.numbers(1, 6, 64), cases.numbers(4, seed=3))


def test_rows_of_a_packed_embedding() -> None:
    packed = mx.quantize(cases.numbers(30, 64), bits=8)

    def look_up(ids: Any) -> Any:
        parts = [qg.take(qg.tensor(p), ids, axis=0) for p in packed]
        return qg.dequantize(*parts, bits=8) * 2

    agree(look_up, mx.array([[3, 29, 0]]))
    agree(lambda ids: qg.dequantize(*[qg.take(qg.tensor(p), ids, axis=0) for p in packed], bits=8,
                                    dtype=mx.float32), mx.array([[3, 29, 0]]))  # fmt: skip
    agree(lambda x: qg.dequantize(*map(qg.tensor, packed), bits=8) @ x, cases.numbers(64, 2))


LOOPS: dict[str, Any] = {
    "fori": lambda x: qg.fori_loop(0, 5, lambda i, h: qg.tanh(h) + i, x),
    "no turns": lambda x: qg.fori_loop(3, 3, lambda i, h: h * 2, x),
    "bounds": lambda x: qg.fori_loop(
        qg.argmin(x[0]).astype(mx.int32), qg.argmax(x[0]).astype(mx.int32), lambda i, h: h + i, x),
    "swapped": lambda x: qg.fori_loop(0, 3, lambda i, c: (c[1] + i, c[0], c[0] * 2),
                                      (x, x + 1, x * 3)),
    "kept": lambda x: qg.fori_loop(0, 3, lambda i, c: (c[0] + c[1], c[1]), (x, x * 2)),
    "scan": lambda x: qg.scan(lambda c, s: (c * 0.5 + s, c.sum()), x[0], x),
    "scan back": lambda x: qg.scan(lambda c, s: (c * 0.5 + s, s + c), x[0], x, reverse=True),
    "scan, turned": lambda x: qg.scan(lambda c, s: (c + s, s), x[:, 0], qg.transpose(x)),
    "while": lambda x: qg.while_loop(lambda h: qg.sum(h) < 100, lambda h: h + 1, x),
    "cond": lambda x: qg.cond(qg.sum(x) > 0, lambda x: (x * 2, x), lambda x: (x - 1, x + 2), x),
    "other cond": lambda x: qg.cond(qg.sum(x) > 1e9, lambda x: x * 2, lambda x: x - 1, x),
    "nested": lambda x: qg.fori_loop(0, 3, lambda i, h: qg.scan(
        lambda c, s: (c + s * i, c), h[0], h)[1] * 0.5, x),
    "in place": lambda x: qg.fori_loop(0, 3, lambda i, c: qg.slice_update(
        c, c[:1] * 0 + i, i.reshape(1), axes=(0,)), x),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str) -> None:
    agree(LOOPS[name], cases.numbers(4, 9))


def test_a_cache_is_written_where_it_is_and_the_caller_s_stays() -> None:
    def step(cache: Any, row: Any, at: Any) -> Any:
        cache = qg.slice_update(cache, row, at, axes=(1,))
        return cache, cache.sum(axis=1)

    cache, row = mx.zeros((2, 8, 3)), mx.ones((2, 1, 3))
    (after, _), _ = both_ways(step, cache, row, mx.array([3]))
    assert after[0, 3].tolist() == [1, 1, 1]
    assert cache.sum().item() == 0
    graph = qg.trace(step, *[qg.spec(x.shape, x.dtype) for x in (cache, row, mx.array([3]))])
    program = qg.compile(graph, target="cpu", passes=[FormRegions(everywhere=True)])
    native = program.executables[0].lowered.steps[0].native
    assert native.translation.over == {0}  # no copy is a step


def test_a_cache_that_is_handed_over_is_not_copied() -> None:
    def step(state: Any, row: Any, at: Any) -> Any:
        return [qg.slice_update(state[0], row, at, axes=(1,))]

    specs = [qg.spec((2, 8192, 3))], qg.spec((2, 1, 3)), qg.spec((1,), mx.int32)
    program = qg.compile(step, *specs, target="cpu", donate=[0],
                         passes=[FormRegions(everywhere=True)])  # fmt: skip
    state, row = [mx.zeros((2, 8192, 3))], mx.ones((2, 1, 3))
    mx.eval(state, row)
    place = address(state[0])
    for i in range(3):
        state = program(state, row, mx.array([i], mx.int32))
        assert address(state[0]) == place
    assert state[0][:, :4, 0].tolist() == [[1, 1, 1, 0]] * 2
    view = state[0][:, :2]
    mx.eval(view)
    state = program(state, row * 2, mx.array([0], mx.int32))  # a view holds the buffer too
    assert view[0, :, 0].tolist() == [1, 1]
    assert state[0][0, :2, 0].tolist() == [2, 1]


def test_inputs_of_any_strides() -> None:
    x = mx.transpose(cases.numbers(5, 7))
    program = qg.compile(lambda x: qg.exp(x) @ x.T, qg.spec((7, 5)), target="cpu",
                         passes=with_regions())  # fmt: skip
    exact = np.exp(to_numpy(x).astype(np.float64)) @ to_numpy(x).T
    assert error(program(x), exact) < 1e-6
    assert error(program(mx.broadcast_to(mx.array(1.0), (7, 5))), np.full((7, 7), np.e * 5)) < 1e-6


def test_threads_at_once() -> None:
    w = mx.quantize(cases.numbers(64, 64))
    program = qg.compile(lambda x: qg.softmax(qg.quantized_matmul(x, *w)), qg.spec((3, 64)),
                         target="cpu", passes=with_regions())  # fmt: skip
    inputs = [cases.numbers(3, 64, seed=i) for i in range(4)]
    wanted = [to_numpy(program(x)) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with mx.stream(mx.cpu):
            for _ in range(50):
                if not np.array_equal(to_numpy(program(inputs[i])), wanted[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@settings(max_examples=40, deadline=None, derandomize=True)
@given(program=programs(["affine-4-32", "mxfp4"]))
def test_random_graphs(program: tuple[Any, ...]) -> None:
    weights = parameters(["affine-4-32", "mxfp4"])
    specs = (qg.spec((ROWS, K)),)
    graph = qg.trace(lambda h, *w: run(program, w or weights, h), *specs)
    x = cases.numbers(ROWS, K, seed=3)
    (exact,) = InNumPy().run(graph, [to_numpy(x).astype(np.float64)])
    with not_compiled():  # MLX (0.32.4) fails on equal ops of several results
        compiled = qg.compile(graph, target="cpu", passes=with_regions())
        body = qg.compile(inlined(compiled.plan.graph), target="cpu", passes=[])
        allowed = 2 * error(as_list(body(x))[0], exact) + 1e-5
        assert error(as_list(compiled(x))[0], exact) <= allowed


def test_a_loop_over_an_argument_leaves_it_as_it_was() -> None:
    """What a loop carries lies in a buffer of its own, unless it is the result."""
    w = mx.random.normal((128, 128), key=mx.random.key(1)) / 11

    def fn(x: Any) -> Any:
        return qg.tanh(qg.fori_loop(0, 2, lambda i, h: qg.quantized_matmul(h, w), x))

    x = mx.random.normal((3, 128), key=mx.random.key(0))
    before = np.array(x)
    program = qg.compile(fn, x, target="cpu")
    first, second = np.array(program(x)), np.array(program(x))
    np.testing.assert_array_equal(np.array(x), before)
    np.testing.assert_array_equal(first, second)
    dense = np.array(mx.dequantize(*mx.quantize(w))).astype(np.float64)
    expected = np.tanh(before.astype(np.float64) @ dense.T @ dense.T)
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["add", "multiply"])
def test_two_products_that_meet(op: str) -> None:
    """As where attention and feed-forward stand side by side: the first takes the sum with it."""
    x, a, b = (np.random.default_rng(i).normal(size=(64, 64)).astype(np.float32) for i in range(3))
    left, right = mx.array(a), mx.array(b)
    program = qg.compile(
        lambda x: getattr(qg, op)(x @ left, qg.exp(x) @ right),
        qg.spec((64, 64)), target="cpu", passes=[FormRegions(as_target("cpu"), everywhere=True)],
    )  # fmt: skip
    region = program.plan.graph.nodes[-1]
    assert region.op == "region"
    assert bound(region, {}, mx.Device(mx.cpu, 0)) is not None
    wide = np.float64(x)
    expected = getattr(np, op)(wide @ a, np.exp(wide) @ b)
    assert error(program(mx.array(x)), expected) < 1e-5
