"""`fuse-cache`: one token's attention through a cache as one node; `tests/gpu` has the kernel."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.analysis.estimate import estimate
from qgraph.kernels.attention.cached_attention import Heads, Rope, cached_attention
from qgraph.kernels.attention.form import as_position
from qgraph.passes import (
    ChooseAttention,
    EliminateDeadCode,
    FoldConstants,
    FuseCache,
    MergeViews,
    Shard,
)
from qgraph.target import Target, as_target, on_mesh
from tests.support.arrays import to_numpy

LENGTH, DIM, HEADS, KV = 12, 64, 4, 2
WIDTH = (HEADS + 2 * KV) * DIM
PASSES = [
    FoldConstants(), ChooseAttention(everywhere=True), FuseCache(everywhere=True), MergeViews(),
    EliminateDeadCode(),
]  # fmt: skip
FREQS = mx.random.uniform(1.0, 50.0, (DIM // 2,), key=mx.random.key(9))


def operands(batch: int = 1) -> list[mx.array]:
    """The product of Q, K and V for one token, keys, values."""
    x = mx.random.normal((batch, 1, WIDTH), key=mx.random.key(0))
    shape = (batch, KV, LENGTH, DIM)
    return [x, *(mx.random.normal(shape, key=mx.random.key(i)) for i in (1, 2))]


def step(**changed: Any) -> Any:
    """A decoding step; `changed` departs from what the pass takes."""
    rope = {"dims": DIM, "traditional": False, "base": 1e4, "scale": 1.0, **changed.get("rope", {})}

    def fn(x: Any, keys: Any, values: Any, position: Any) -> Any:
        batch = x.shape[0]
        parts = qg.split(x, [HEADS * DIM, (HEADS + KV) * DIM], axis=-1)
        q, k, v = (p.reshape(batch, 1, -1, DIM).transpose(0, 2, 1, 3) for p in parts)

        def turned(y: Any, offset: Any = position) -> Any:
            return qg.fast.rope(y, offset=offset, **rope) if rope["dims"] else y

        number = changed.get("number", lambda p: p)(position)
        q, k = turned(q, number), turned(k, changed.get("offset", lambda p: p)(number))
        start = position.reshape(1)
        keys = qg.slice_update(keys, k, start, axes=(2,))
        values = qg.slice_update(values, v, changed.get("start", lambda s: s)(start), axes=(2,))
        seen = qg.arange(LENGTH) <= position
        if "mask" in changed:
            seen = seen & (qg.sin(qg.arange(LENGTH)) > 0)
        if window := changed.get("window"):
            seen = seen & (position < qg.arange(LENGTH) + window)
        y = qg.fast.scaled_dot_product_attention(
            q, keys, values, scale=0.125, mask=seen, sinks=changed.get("sinks")
        )
        y = y.transpose(0, 2, 1, 3).reshape(batch, 1, -1)
        extra = changed.get("extra", lambda *_: ())(keys, k)
        return (y, keys, values, *extra)

    return fn


def plan(fn: Any, batch: int = 1) -> qg.Plan:
    graph = qg.trace(fn, *operands(batch), mx.array(5), name="f")
    return qg.optimize(graph, passes=PASSES, target="cpu")


def ops(graph: qg.Graph) -> list[str]:
    return [n.op for _, n in graph.walk() if n.op not in ("constant", "reshape")]


def test_on_a_mesh_a_rank_has_its_heads() -> None:
    """Case 1: what joins the parts of a cache for the caller reads it, and nothing else does."""
    passes = [Shard(on_mesh(as_target("cpu"), qg.Mesh(2)), states=((1, 1), (2, 2))), *PASSES]
    w = mx.random.normal((WIDTH, 64), key=mx.random.key(3))
    fn = lambda x, *given: step()(x @ w.T, *given)  # noqa: E731
    given = mx.ones((1, 1, 64)), *operands()[1:], mx.array(5)
    graph = qg.optimize(qg.trace(fn, *given), passes=passes, target="cpu").graph
    (node,) = [n for n in graph.nodes if n.op == "cached_attention"]
    assert [v.shape for v in node.outputs[1:]] == [(1, KV // 2, LENGTH, DIM)] * 2


def rotate(x: Any, position: int, *, dims: int, traditional: bool, scale: float,
           base: float | None = None, freqs: Any = None) -> Any:  # fmt: skip
    """x (..., dim), by the formula of RoFormer (arXiv 2104.09864), in float64."""
    half, y = dims // 2, x.copy()
    each = 1 / to_numpy(freqs) if base is None else base ** -(np.arange(half) / max(1, half))
    angle = scale * position * each
    first = 2 * np.arange(half) if traditional else np.arange(half)
    second = first + (1 if traditional else half)
    y[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    y[..., second] = x[..., first] * np.sin(angle) + x[..., second] * np.cos(angle)
    return y


def in_float64(given: list[mx.array], position: int, **rope: Any) -> list[Any]:
    x, keys, values = (to_numpy(a).astype(np.float64) for a in given)
    heads = x.reshape(len(x), -1, DIM)
    q, k, v = heads[:, :HEADS], heads[:, HEADS:-KV], heads[:, -KV:]
    q, k = (rotate(a, position, **rope) for a in (q, k))
    keys[:, :, position], values[:, :, position] = k, v
    seen = (np.repeat(a[:, :, : position + 1], HEADS // KV, axis=1) for a in (keys, values))
    seen_keys, seen_values = seen
    scores = 0.125 * np.einsum("bhd,bhld->bhl", q, seen_keys)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("bhl,bhld->bhd", p / p.sum(-1, keepdims=True), seen_values)
    return [y.reshape(len(x), 1, -1), keys, values]


ROPES: dict[str, dict[str, Any]] = {
    "whole heads": {},
    "traditional": {"traditional": True},
    "half of a head": {"dims": DIM // 2, "scale": 0.5},
    "frequencies": {"base": None, "freqs": FREQS},
    "none": {"dims": 0},
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("position", [0, 5, LENGTH - 1])
def test_numbers(rope: str, batch: int, position: int) -> None:
    made = plan(step(rope=ROPES[rope]), batch)
    assert ops(made.graph) == ["cached_attention"]
    given = operands(batch)
    results = qg.compile(made.graph, passes=[], target="cpu")(*given, mx.array(position))
    settings = {"dims": DIM, "traditional": False, "base": 1e4, "scale": 1.0, **ROPES[rope]}
    for got, want in zip(results, in_float64(given, position, **settings), strict=True):
        np.testing.assert_allclose(to_numpy(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int16, mx.uint32, mx.int64, mx.uint64], ids=str)
def test_positions_of_other_types(dtype: mx.Dtype) -> None:
    for length in (LENGTH, 70_000):
        for position in (0, LENGTH - 1, LENGTH, 100):
            got = as_position(mx.array(position, dtype), length)
            assert (got.dtype, got.item()) == (mx.int32, min(position, length))


def test_it_costs_what_its_parts_cost() -> None:
    graph = qg.trace(step(rope={"dims": 0}), *operands(), mx.array(5))
    (apart,) = [estimate(n) for n in graph.nodes if "attention" in n.op]
    for made in (plan(step(rope={"dims": 0})), plan(step())):
        (fused,) = [estimate(n) for n in made.graph.nodes if n.op == "cached_attention"]
        assert apart.flops <= fused.flops < 1.2 * apart.flops


def test_text() -> None:
    lines = plan(step()).graph.format(origins=False).splitlines()
    assert lines[1:] == [
        "  %0: i32[1] = reshape(position) {shape=(1,)}",
        "  %1: f32[1,4,1,64], %2: f32[1,2,12,64], %3: f32[1,2,12,64] = cached_attention("
        "x, x, x, keys, values, %0, position) {heads=((4, 0, 512), (2, 256, 512), (2, 384, 512)), "
        "rope=(64, False, 10000.0, 1.0), scale=0.125}",
        "  %4: f32[1,1,256] = reshape(%1) {shape=(1, 1, 256)}",
        "  return %4, %2, %3",
    ]


def test_in_a_nested_loop() -> None:
    """The cache is carried through two loops; each turn stores one token."""

    def fn(x: Any, keys: Any, values: Any, position: Any) -> Any:
        def turn(carry: Any, _: Any) -> Any:
            x, keys, values, position = carry
            y, keys, values = step()(x, keys, values, position)
            x = x + qg.concatenate([y, y], axis=-1)
            return (x, keys, values, position + 1), y

        def outer(_: Any, carry: Any) -> Any:
            return qg.scan(turn, carry, length=3)[0]

        return qg.fori_loop(0, 2, outer, (x, keys, values, position))

    made = plan(fn)
    assert ops(made.graph).count("cached_attention") == 1
    assert "slice_update" not in ops(made.graph)
    program = qg.compile(made.graph, passes=[], target="cpu")
    got = program(*operands(), mx.array(1))
    x, keys, values = (to_numpy(a).astype(np.float64) for a in operands())
    for position in range(1, 7):
        rope = {"dims": DIM, "traditional": False, "base": 1e4, "scale": 1.0}
        given = [mx.array(a, mx.float32) for a in (x, keys, values)]
        y, keys, values = in_float64(given, position, **rope)
        x = x + np.concatenate([y, y], axis=-1)
    for ours, want in zip(got, (x, keys, values), strict=False):
        np.testing.assert_allclose(to_numpy(ours), want, rtol=2e-4, atol=2e-5)


def test_a_ring() -> None:
    """Case 2: turned by a number that is not the place that the token is stored at."""
    fn = step(number=lambda position: position + 3 * LENGTH)
    made = plan(fn)
    assert made.graph.format(origins=False).splitlines()[1:4] == [
        "  %0: i32[] = add(position, 36)",
        "  %1: i32[1] = reshape(position) {shape=(1,)}",
        "  %2: f32[1,4,1,64], %3: f32[1,2,12,64], %4: f32[1,2,12,64] = cached_attention("
        "x, x, x, keys, values, %1, position, offset=%0) {heads=((4, 0, 512), (2, 256, 512), "
        "(2, 384, 512)), rope=(64, False, 10000.0, 1.0), scale=0.125}",
    ]
    program = qg.compile(made.graph, passes=[], target="cpu")
    got = program(*operands(), mx.array(5))
    given = [mx.array(a, mx.float32) for a in operands()]
    x, keys, values = (to_numpy(a).astype(np.float64) for a in given)
    q, k, v = np.split(x.reshape(1, -1, DIM), [HEADS, HEADS + KV], axis=1)
    rope = {"dims": DIM, "traditional": False, "base": 1e4, "scale": 1.0}
    keys[:, :, 5], values[:, :, 5] = rotate(k, 5 + 3 * LENGTH, **rope), v
    scores = 0.125 * np.einsum(
        "bhd,bhld->bhl", rotate(q, 5 + 3 * LENGTH, **rope), np.repeat(keys[:, :, :6], 2, axis=1)
    )
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum(
        "bhl,bhld->bhd", p / p.sum(-1, keepdims=True), np.repeat(values[:, :, :6], 2, axis=1)
    )
    for ours, want in zip(got, (y.reshape(1, 1, -1), keys, values), strict=True):
        np.testing.assert_allclose(to_numpy(ours), want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("more", [{"sinks": True}, {"window": 4}, {"sinks": True, "window": 7}])
def test_sinks_and_windows(more: dict[str, Any]) -> None:
    """Case 1: they go with it."""
    sinks = mx.random.normal((HEADS,), key=mx.random.key(5)) if "sinks" in more else None
    made = plan(step(rope={"dims": 0}, **{**more, "sinks": sinks}))
    assert ops(made.graph) == ["cached_attention"]
    got = qg.compile(made.graph, passes=[], target="cpu")(*operands(), mx.array(9))
    x, keys, values = (to_numpy(a).astype(np.float64) for a in operands())
    q, k, v = np.split(x.reshape(1, -1, DIM), [HEADS, HEADS + KV], axis=1)
    keys[:, :, 9], values[:, :, 9] = k, v
    of = slice(max(0, 10 - more.get("window", LENGTH)), 10)
    scores = 0.125 * np.einsum("bhd,bhld->bhl", q, np.repeat(keys[:, :, of], 2, axis=1))
    p = np.exp(scores)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(to_numpy(sinks))[None, :, None]
    y = np.einsum("bhl,bhld->bhd", p / total, np.repeat(values[:, :, of], 2, axis=1))
    for ours, want in zip(got, (y.reshape(1, 1, -1), keys, values), strict=True):
        np.testing.assert_allclose(to_numpy(ours), want, rtol=2e-4, atol=2e-5)


def test_a_number_for_each_row_stays_outside() -> None:
    fn = step(number=lambda position: qg.stack([position, position + 1]))
    made = plan(fn, batch=2)
    assert ops(made.graph).count("fast.rope") == 2
    assert ops(made.graph).count("cached_attention") == 1


OUTSIDE: dict[str, dict[str, Any]] = {
    "the key is turned by another position": {"offset": lambda p: p + 1},
    "something reads the turned key": {"extra": lambda _, k: (k,)},
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_rotations_that_stay_outside(case: str) -> None:
    made = plan(step(**OUTSIDE[case]))
    found = ops(made.graph)
    assert found.count("fast.rope") == 2
    assert found.count("cached_attention") == 1
    given = [*operands(), mx.array(5)]
    program = qg.compile(made.graph, passes=[], target="cpu")
    for got, want in zip(program(*given), step(**OUTSIDE[case])(*given), strict=True):
        np.testing.assert_allclose(to_numpy(got), to_numpy(want), rtol=1e-4, atol=1e-5)


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "something reads the keys": ({"extra": lambda keys, _: (keys + 1,)}, "something else reads"),
    "two positions": ({"start": lambda s: s + 1}, "at different positions"),
    "a mask besides": ({"mask": True}, "the attention has mask"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case: str) -> None:
    changed, why = NEAR_MISSES[case]
    made = plan(step(**changed))
    assert "cached_attention" not in ops(made.graph)
    (entry,) = [e for e in made.ledger() if e.made_by == "fuse-cache"]
    assert (entry.decision, why in entry.reason) == ("refused", True)


UPDATES: dict[str, Any] = {
    "two tokens": lambda: qg.zeros((1, KV, 2, DIM)),
    "one head": lambda: qg.ones((1, 1, 1, DIM)),
    "another dtype": lambda: qg.ones((1, KV, 1, DIM), mx.float16),
}


def stored(update: Any, axes: tuple[int, ...] = (2,)) -> Any:
    """Attention to a cache that `update` is stored in as both keys and values."""

    def fn(x: Any, keys: Any, values: Any, position: Any) -> Any:
        q = x[..., : HEADS * DIM].reshape(1, HEADS, 1, DIM)
        start = position.reshape(1)
        keys = qg.slice_update(keys, update(), start, axes=axes)
        values = qg.slice_update(values, update(), start, axes=axes)
        mask = qg.arange(LENGTH) <= position
        return qg.fast.scaled_dot_product_attention(q, keys, values, scale=0.1, mask=mask), keys

    return fn


def agrees(made: qg.Plan, fn: Any) -> None:
    given = [*operands(), mx.array(5)]
    program = qg.compile(made.graph, passes=[], target="cpu")
    for got, want in zip(program(*given), fn(*given), strict=True):
        np.testing.assert_allclose(to_numpy(got), to_numpy(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("update", UPDATES)
def test_updates_of_another_type(update: str) -> None:
    fn = stored(UPDATES[update])
    made = plan(fn)
    assert "cached_attention" not in ops(made.graph)
    (entry,) = [e for e in made.ledger() if e.made_by == "fuse-cache"]
    assert "one token of all heads" in entry.reason
    agrees(made, fn)


def test_updates_along_another_axis() -> None:
    fn = stored(lambda: qg.ones((1, 1, LENGTH, DIM)), axes=(1,))

    def at_zero(x: Any, keys: Any, values: Any, position: Any) -> Any:
        return fn(x, keys, values, position * 0)

    made = plan(at_zero)
    assert "cached_attention" not in ops(made.graph)
    agrees(made, at_zero)


def test_axes_counted_from_the_end_and_one_update_for_both() -> None:
    one = mx.random.normal((1, KV, 1, DIM), key=mx.random.key(4))
    fn = stored(lambda: one, axes=(-2,))
    made = plan(fn)
    assert ops(made.graph).count("cached_attention") == 1
    agrees(made, fn)


def test_a_cache_that_two_layers_share_is_updated_apart_once() -> None:
    def fn(x: Any, keys: Any, values: Any, position: Any) -> Any:
        y, keys, values = step()(x, keys, values, position)
        again = step()(qg.concatenate([y, y], axis=-1), keys, values, position + 1)
        return again

    made = plan(fn)
    assert ops(made.graph).count("cached_attention") == 1
    assert ops(made.graph).count("slice_update") == 2
    agrees(made, fn)


@pytest.mark.parametrize("backend", ["cpu", "metal"])
def test_other_targets_keep_theirs(backend: str) -> None:
    graph = qg.trace(step(), *operands(), mx.array(5))
    assert FuseCache(Target(mx.Device(mx.cpu, 0), backend, "any", 2))(graph) is graph


@pytest.mark.parametrize("position", [LENGTH, -1])
def test_nothing_is_stored_outside_the_cache(position: int) -> None:
    x, keys, values = operands()
    heads = tuple(Heads(n, s * DIM, WIDTH) for n, s in ((HEADS, 0), (KV, HEADS), (KV, HEADS + KV)))
    place = mx.array(position)
    _, *after = cached_attention(
        x, x, x, keys, values, place, mx.array(3), heads=heads, rope=Rope(), scale=0.1
    )
    for got, before in zip(after, (keys, values), strict=True):
        assert mx.array_equal(got, before)


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    given = [*operands(), mx.array(5)]
    program = qg.compile(plan(step()).graph, passes=[], target="cpu")
    program.save(tmp_path / "step")
    loaded = qg.load(tmp_path / "step")
    for got, want in zip(loaded(*given), program(*given), strict=True):
        assert mx.array_equal(got, want)
