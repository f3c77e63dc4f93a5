"""Programs: inputs, threads, specialisation, shared weights, parameters, released floats."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.errors import InputError, QGraphError, TraceError
from tests.support.passes import passes_without

W = mx.random.normal((128, 64), key=mx.random.key(1))
X = mx.random.normal((2, 64), key=mx.random.key(2))


def step(x: Any) -> Any:
    return qg.fori_loop(0, 3, lambda i, h: qg.tanh(qg.quantized_matmul(h, W)[:, :64]), x)


def test_trees_in_and_out() -> None:
    def fn(a: Any, *, b: Any) -> Any:
        return {"sum": a["x"] + b, "list": [a["y"][0], (b,)], "none": None, "two": 2}

    args = {"x": X, "y": [X * 2]}
    result = qg.compile(fn, args, b=X)(args, b=X)
    assert list(result) == ["sum", "list", "none", "two"]
    assert mx.array_equal(result["sum"], X + X)
    assert mx.array_equal(result["list"][1][0], X)
    assert result["none"] is None
    assert result["two"] == 2


def test_an_argument_may_be_the_very_array_that_is_captured() -> None:
    program = qg.compile(lambda x: x + X, qg.spec(X.shape))
    assert mx.array_equal(program(X), X + X)


def test_numpy_arguments() -> None:
    program = qg.compile(lambda x: x * 2, qg.spec((2, 64)))
    assert mx.array_equal(program(np.array(X)), X * 2)


def test_graphs_without_nodes_inputs_or_arrays() -> None:
    assert mx.array_equal(qg.compile(lambda x: x, qg.spec(X.shape))(X), X)
    assert mx.array_equal(qg.compile(lambda: qg.ones((2,)) * 3)(), mx.array([3.0, 3.0]))
    assert qg.compile(lambda x: (), qg.spec((2,)))(mx.ones(2)) == ()


def test_input_errors_name_the_argument() -> None:
    program = qg.compile(step, qg.spec((2, 64)))
    with pytest.raises(InputError, match=r"x is f32\[3,64\], not f32\[2,64\]"):
        program(mx.ones((3, 64)))
    with pytest.raises(InputError, match=r"x is f16\[2,64\]"):
        program(X.astype(mx.float16))
    with pytest.raises(
        InputError, match=r"takes 1 positional argument, 2 were(?s:.*)x: f32\[2,64\]"
    ):
        program(X, X)
    with pytest.raises(InputError, match=r"x is \[array\], not array"):
        program([X])
    with pytest.raises(TraceError, match="symbolic"):
        qg.trace(lambda x: program(x), X)
    with pytest.raises(InputError, match="no parameters"):
        program.prepare(W)
    assert program(X).shape == (2, 64)


@pytest.mark.parametrize(
    "other", [(X,), (X, X, X), (X, 2.0), ([X], X), (X, X.astype(mx.float16)), (X[:1], X)],
    ids=["few", "many", "number", "list", "dtype", "shape"],
)  # fmt: skip
def test_a_program_of_one_kind_still_tells_what_it_is_given(other: tuple[Any, ...]) -> None:
    program, jitted = qg.compile(lambda x, y: x * y + 1, X, X), qg.jit(lambda x, y: x * y + 1)
    for call in (program, jitted):
        assert mx.array_equal(call(X, X), X * X + 1)
    with pytest.raises(InputError):
        program(*other)
    if len(other) == 2 and all(isinstance(a, mx.array) for a in other):
        assert mx.allclose(jitted(*other), other[0] * other[1] + 1)
    for call in (program, jitted):
        assert mx.array_equal(call(X, X), X * X + 1)
        assert mx.array_equal(call(np.array(X), X), X * X + 1)


def test_jit_specialises_and_shares_weights() -> None:
    program = qg.jit(step)
    for rows in (1, 2, 5, 2):
        x = mx.random.normal((rows, 64), key=mx.random.key(rows))
        assert mx.allclose(program(x), step(x), rtol=1e-5, atol=1e-5)
    assert len(program.executables) == 3
    packed = sum(p.nbytes for p in mx.quantize(W))
    assert program.weight_bytes == packed
    first, *others = [[a for a in e.known.values() if a.ndim] for e in program.executables]
    assert all(
        mine is theirs for other in others for mine, theirs in zip(first, other, strict=True)
    )


def test_jit_keeps_static_arguments_apart() -> None:
    program = qg.jit(lambda x, n: x * n)
    assert program(mx.array(2.0), 3).item() == 6
    assert program(mx.array(2.0), 4).item() == 8
    assert len(program.executables) == 2


def test_any_thread_may_call() -> None:
    program = qg.compile(
        lambda x: sum(qg.quantized_matmul(x, W, bits=b) for b in (2, 3, 4, 8)), qg.spec((2, 64))
    )
    expected = program(X)
    mx.eval(expected)
    results: dict[int, bool] = {}

    def call(number: int) -> None:
        for _ in range(5):
            results[number] = bool(mx.array_equal(program(X), expected))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


def test_targets() -> None:
    for target in ("cpu", mx.cpu, mx.Device(mx.cpu, 0), qg.as_target("cpu")):
        assert qg.compile(step, qg.spec((2, 64)), target=target).plan.target.backend == "cpu"
    with pytest.raises(ValueError, match="target='tpu'"):
        qg.compile(step, qg.spec((2, 64)), target="tpu")


def parametric(params: Any, x: Any) -> Any:
    def body(i: Any, h: Any) -> Any:
        return qg.tanh(qg.quantized_matmul(h, params["w"])[:, :64]) * params["scale"]

    return qg.fori_loop(0, 3, body, x)


def test_parameters_are_prepared_once() -> None:
    params = {"w": W, "scale": mx.array(0.5)}
    program = qg.compile(parametric, params, X, parameters=[0])
    assert {n.stage for n in program.plan.graph.nodes if n.op == "quantize"} == {"prepare"}
    expected = parametric(params, X)
    prepared = program.prepare(params)
    assert mx.allclose(program(prepared, X), expected, atol=1e-5)
    assert mx.allclose(program(params, X), expected, atol=1e-5)
    assert prepared.nbytes == sum(p.nbytes for p in mx.quantize(W)) + 4
    other = {"w": W * 2, "scale": mx.array(1.0)}
    assert mx.allclose(program(program.prepare(other), X), parametric(other, X), atol=1e-5)
    with pytest.raises(InputError, match="another program"):
        qg.compile(parametric, params, X, parameters=[0])(prepared, X)
    with pytest.raises(InputError, match=r"prepare: params.w is f32\[64,64\], not f32\[128,64\]"):
        program.prepare({"w": W[:64], "scale": mx.array(1.0)})
    with pytest.raises(InputError, match=r"x is f32\[1,64\], not f32\[2,64\]"):
        program(prepared, X[:1])


def test_prepared_parameters_do_not_hold_the_float_ones() -> None:
    program = qg.compile(parametric, {"w": W, "scale": mx.array(0.5)}, X, parameters=[0])
    w = W + 0
    mx.eval(w)
    alive = weakref.ref(w)
    prepared = program.prepare({"w": w, "scale": mx.array(0.5)})
    del w
    gc.collect()
    assert alive() is None
    assert program(prepared, X).shape == (2, 64)


def test_float_weights_are_released_once_packed() -> None:
    weights = [mx.random.normal((256, 256), key=mx.random.key(i)) for i in range(4)]
    mx.eval(weights)
    alive = [weakref.ref(w) for w in weights]

    def fn(x: Any) -> Any:
        for w in weights:
            x = qg.quantized_matmul(x, w)
        return x

    program = qg.compile(fn, qg.spec((1, 256)))
    del fn
    weights.clear()
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4
    assert program(mx.ones((1, 256))).shape == (1, 256)
    with pytest.raises(QGraphError, match="released"):
        qg.compile(program.plan.source, passes=[])


def test_a_graph_is_not_released_unless_asked() -> None:
    graph = qg.trace(step, X)
    first, second = qg.compile(graph), qg.compile(graph)
    assert mx.array_equal(first(X), second(X))
    qg.compile(graph, release=True)
    assert all(n.args["data"].is_released for n in graph.constants() if n.output.type.ndim)


def test_progress_names_every_weight() -> None:
    seen: list[tuple[str, int, int]] = []
    qg.compile(step, qg.spec((2, 64)), progress=lambda *args: seen.append(args))
    assert seen == [("W", 1, 1)]


def test_lazy_tensors() -> None:
    x = qg.tensor(X, "x")
    y = qg.tanh(x @ qg.tensor(W).T) + 1
    assert mx.allclose(y.eval(), mx.tanh(X @ W.T) + 1, atol=1e-5)
    np.testing.assert_allclose(y.numpy(), np.tanh(np.array(X) @ np.array(W).T) + 1, atol=1e-5)
    assert qg.tensor(mx.array([1.5], mx.bfloat16)).numpy().dtype == np.float32
    with pytest.raises(TraceError, match="depends on x"):
        qg.trace(lambda x: (x + 1).eval(), X)


def test_programs_are_deterministic_in_text_and_value() -> None:
    texts = {str(qg.optimize(qg.trace(step, X)).graph) for _ in range(3)}
    assert len(texts) == 1
    results = [qg.compile(step, X)(X) for _ in range(2)]
    assert mx.array_equal(*results)


def packed_arrays(*programs: qg.Program) -> set[int]:
    return {id(a) for p in programs for e in p.executables for a in e.known.values()}


def test_one_row_and_many_have_a_plan_each_and_one_packed_copy() -> None:
    w = mx.random.normal((64, 512), key=mx.random.key(3))
    passes = passes_without("form-regions")
    program = qg.jit(lambda x: qg.quantized_matmul(x, w), target="cpu", passes=passes)
    kernels = []
    for m in (1, 8, 256):
        x = mx.random.normal((m, 512), key=mx.random.key(m))
        y = program(x)
        assert mx.allclose(y, qg.quantized_matmul(x, w), rtol=1e-4, atol=1e-4)
        kernels.append([n.kernel for n in program.plan.graph.nodes if n.kernel])
    assert kernels[0] != kernels[2]  # many rows are better off with another kernel
    packed = sum(a.nbytes for a in mx.quantize(w))
    assert program.weight_bytes == packed


def test_programs_share_packed_weights() -> None:
    one = qg.jit(lambda x: qg.quantized_matmul(x, W), target="cpu")
    other = qg.jit(lambda x: qg.tanh(qg.quantized_matmul(x, W)), target="cpu", share=one)
    third = qg.compile(lambda x: qg.sin(qg.quantized_matmul(x, W)), X, target="cpu", share=one)
    apart = qg.jit(lambda x: qg.quantized_matmul(x, W), target="cpu")
    y = one(X)
    assert mx.array_equal(other(X), mx.tanh(y))
    assert mx.array_equal(third(X), mx.sin(y))
    assert mx.array_equal(apart(X), y)
    assert len(packed_arrays(one, other, third)) == len(packed_arrays(one)) == 3
    assert not packed_arrays(one) & packed_arrays(apart)
    with pytest.raises(InputError, match="give a program"):
        qg.jit(lambda x: x, share="one")  # type: ignore[arg-type]


def test_options_of_passes_given_twice_are_refused() -> None:
    for options in ({"budget": 1}, {"tune": "measure"}):
        with pytest.raises(InputError, match="belong to the default passes"):
            qg.compile(lambda x: x, X, passes=[], **options)
    with pytest.raises(InputError, match="give one of table, measure"):
        qg.compile(lambda x: x, X, tune="yes")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bytes that dense copies may take"):
        qg.compile(lambda x: x, X, budget=-1)


def test_tune_measures_and_remembers(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    w, x = mx.quantize(mx.random.normal((512, 512))), mx.ones((20, 512))
    fn = lambda x: qg.quantized_matmul(x, *w)  # noqa: E731
    sources = []
    for tune in ("measure", "table"):
        passes = passes_without("form-regions", tune=tune)
        program = qg.compile(fn, x, target="cpu", passes=passes)
        entries = [e for e in program.plan.ledger() if e.made_by == "choose-kernel"]
        sources.append(
            [word for e in entries for word in ("measured", "cache") if word in e.reason]
        )
        assert mx.allclose(program(x), fn(x), rtol=1e-4, atol=1e-4)
    assert sources == [["measured"], ["cache"]]
    assert list(tmp_path.rglob("kernels.json"))


SMALL = mx.arange(6).reshape(2, 3).astype(mx.float32)
HANDED_ON: dict[str, Any] = {
    "the argument": lambda x: x,
    "views that come to nothing": lambda x: (x.reshape(6).reshape(2, 3), x + 1),
    "a weight": lambda x: (qg.tensor(SMALL), x + 1),
    "one value twice": lambda x: (x + 1, x + 1),
    "a loop of no turns": lambda x: qg.while_loop(lambda c: c.sum() < 0, lambda c: c + 1, x),
    "a branch": lambda x: qg.cond(x.sum() > 0, lambda a: a, lambda a: a + 1, x),
    "a constant of a branch": lambda x: qg.cond(
        x.sum() > 0, lambda: qg.zeros((2, 3)), lambda: qg.ones((2, 3))
    ),
}


@pytest.mark.parametrize("case", HANDED_ON)
def test_who_writes_into_a_result_changes_nothing_else(case: str) -> None:
    x = mx.ones((2, 3))
    program = qg.compile(HANDED_ON[case], x, target="cpu")
    results, _ = qg.tree.flatten(program(x))
    before = [np.array(r) for r in results]
    results[0][0] = 9
    assert mx.array_equal(x, mx.ones((2, 3)))
    assert all(np.array_equal(r, b) for r, b in zip(results[1:], before[1:], strict=True))
    again, _ = qg.tree.flatten(program(x))
    assert all(np.array_equal(r, b) for r, b in zip(again, before, strict=True))
