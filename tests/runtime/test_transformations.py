"""MLX's transformations through programs: MLX's own answer, or an error in words.

Each program is called inside of `mx.grad` and its like, and the same function on arrays, which
calls MLX's ops at once, is what it must agree with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from qgraph.errors import TraceError, UnsupportedError
from qgraph.kernels import Problem
from qgraph.kernels.choice.tuner import Choice
from qgraph.kernels.tracers import Tracers
from tests.support.compiler import needs_compiler
from tests.support.passes import passes_without

Fn = Callable[..., Any]
W = mx.random.normal((256, 256), key=mx.random.key(1)) / 16
PACKED = mx.quantize(W)
EXPERTS = mx.quantize(mx.random.normal((4, 256, 256), key=mx.random.key(2)) / 16)
ROTATION = mx.array([[np.cos(0.01), np.sin(0.01)], [-np.sin(0.01), np.cos(0.01)]])
PICKED = mx.array([[0, 2], [3, 1]])


def forced(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    def choose(problem: Problem, names: Sequence[str], **_: Any) -> Choice:
        own = "gather_qmm" if problem.experts else "qmm"
        return Choice(kernel, "table", 1.0) if kernel in names else Choice(own, "table", 1e6)

    monkeypatch.setattr("qgraph.passes.choose_kernel.choose", choose)


def product(x: Any) -> Any:
    return qg.tanh(qg.quantized_matmul(x, *PACKED))


def attention(q: Any) -> Any:
    k = qg.broadcast_to(q[:, :1], (1, 2, 600, 64)) * qg.arange(600, dtype=mx.float32)[:, None] / 600
    mask = qg.arange(600) <= 300
    return qg.fast.scaled_dot_product_attention(q, k, k, scale=0.1, mask=mask)


def gathered(x: Any) -> Any:
    return qg.gather_qmm(x, *EXPERTS, rhs_indices=PICKED)


FUNCTIONS: dict[str, tuple[Fn, tuple[int, ...]]] = {
    "one compiled stretch": (lambda x: qg.exp(x) * x, (3,)),
    "the argument": (lambda x: x, (3,)),
    "views of the argument": (lambda x: x.reshape(3, 1).reshape(3), (3,)),
    "a long loop": (lambda x: qg.fori_loop(0, 2100, lambda i, h: h @ ROTATION, x), (1, 2)),
    "a loop around a product": (lambda x: qg.fori_loop(0, 3, lambda i, h: product(h), x), (4, 256)),
    "streams of its own": (
        lambda x: sum(qg.tanh(x @ (W * i).T) for i in range(1, 4)), (8, 256),
    ),
    "a scan": (lambda x: qg.scan(lambda c, y: (c + y * y, c), x[0], x)[1], (4, 3)),
}  # fmt: skip
BY_VALUE: dict[str, tuple[Fn, tuple[int, ...]]] = {
    "while_loop": (
        lambda x: qg.while_loop(lambda h: h.sum() < 50, lambda h: h * 2, qg.abs(x)),
        (3,),
    ),
    "cond": (lambda x: qg.cond(x.sum() > 0, lambda a: a * 2, lambda a: a * a, x), (3,)),
}


def given(shape: tuple[int, ...], seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def loss(fn: Fn, x: mx.array) -> Callable[[mx.array], mx.array]:
    weight = given(fn(x).shape, 7)
    return lambda x: (fn(x) * weight).sum()


def close(found: Any, wanted: Any) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-4, atol=2e-4)


def through_all(program: qg.Program, fn: Fn, x: mx.array, folder: Path) -> None:
    """Every transformation of MLX, through the program and through the function."""
    mine, theirs = loss(program, x), loss(fn, x)
    expected = [mx.grad(theirs)(x)]
    close([mx.grad(mine)(x)], expected)
    value, gradient = mx.value_and_grad(mine)(x)
    close([value, gradient], [theirs(x), *expected])
    y = mx.ones_like(fn(x))
    close(mx.vjp(program, [x], [y])[1], mx.vjp(fn, [x], [y])[1])
    close([mx.compile(program)(x)], [fn(x)])
    close([mx.compile(mx.grad(mine))(x)], expected)
    close([mx.checkpoint(program)(x)], [fn(x)])
    close([mx.grad(loss(mx.checkpoint(program), x))(x)], expected)
    path = str(folder / "f.mlxfn")
    mx.export_function(path, lambda x: program(x), x)
    close(mx.import_function(path)(x), [fn(x)])
    same(lambda f: mx.jvp(f, [x], [x * 0 + 1])[1], program, fn)
    same(lambda f: [mx.vmap(f)(mx.stack([x, x * 2]))], program, fn)
    assert mx.allclose(program(x), fn(x), rtol=1e-3, atol=1e-3)  # and as ever afterwards


def same(transformed: Callable[[Fn], Any], program: Fn, fn: Fn) -> None:
    """MLX knows no jvp and no vmap of some ops: a program says what MLX says."""
    try:
        expected = transformed(fn)
    except (ValueError, RuntimeError) as error:
        with pytest.raises(type(error), match=re.escape(str(error)[:30])):
            transformed(program)
        return
    close(transformed(program), expected)


@pytest.mark.parametrize("case", FUNCTIONS)
def test_transformations(case: str, tmp_path: Path) -> None:
    fn, shape = FUNCTIONS[case]
    x = given(shape)
    through_all(qg.compile(fn, x, target="cpu"), fn, x, tmp_path)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize(
    "kernel",
    [pytest.param("simd", marks=needs_compiler), "host-blas", "dense+host-blas", "f32+qmm"],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_products(
    kernel: str, rows: int, dtype: mx.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(monkeypatch, kernel)
    x = given((rows, 256)).astype(dtype)
    w = mx.quantize(W.astype(dtype))
    fn = lambda x: qg.tanh(qg.quantized_matmul(x, *w)).astype(mx.float32)  # noqa: E731
    passes = passes_without("form-regions", budget=1 << 40)
    program = qg.compile(fn, x, target="cpu", passes=passes)
    mine, theirs = (mx.grad(loss(f, x)) for f in (program, fn))
    np.testing.assert_allclose(
        np.array(mine(x).astype(mx.float32)), np.array(theirs(x).astype(mx.float32)),
        rtol=2e-2 if dtype == mx.float16 else 1e-4, atol=1e-2 if dtype == mx.float16 else 1e-5,
    )  # fmt: skip
    if dtype == mx.float32 and rows == 4:
        dense = mx.dequantize(*w)  # of whose product MLX knows jvp and vmap too
        as_dense = lambda x: mx.tanh(x @ dense.T)  # noqa: E731
        through_all(program, as_dense if kernel.startswith("dense") else fn, x, tmp_path)


@needs_compiler
def test_attention_on_the_host(tmp_path: Path) -> None:
    x = given((1, 2, 1, 64))
    program = qg.compile(attention, x, target="cpu")
    through_all(program, attention, x, tmp_path)


@pytest.mark.parametrize(
    "kernel", [pytest.param("group+simd", marks=needs_compiler), "group+host-blas"]
)
def test_experts(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, kernel)
    x = given((2, 2, 3, 256))
    program = qg.compile(gathered, x, target="cpu", passes=passes_without("form-regions"))
    assert kernel in {n.kernel for n in program.plan.graph.nodes}
    close([mx.grad(loss(program, x))(x)], [mx.grad(loss(gathered, x))(x)])


@pytest.mark.parametrize("case", BY_VALUE)
def test_what_goes_on_by_value(case: str) -> None:
    fn, shape = BY_VALUE[case]
    x = mx.abs(given(shape))
    program = qg.compile(fn, x, target="cpu")
    close([mx.grad(loss(program, x))(x)], [mx.grad(loss(fn, x))(x)])
    for transform in (lambda f: mx.vmap(f)(mx.stack([x, x])), lambda f: mx.compile(f)(x)):
        with pytest.raises(UnsupportedError, match=f"{case} needs to know how it goes on"):
            transform(program)
    close([program(x)], [fn(x)])


def test_one_value_twice_has_both_gradients() -> None:
    x = given((3,))
    program = qg.compile(lambda x: (x * 2, x * 2, x), x, target="cpu")

    def total(x: mx.array) -> mx.array:
        a, b, c = program(x)
        return (a + 10 * b + 100 * c).sum()

    assert mx.grad(total)(x).tolist() == [122.0] * 3


def test_gradients_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    fn = lambda p, x: qg.tanh(x @ p["w"]) * qg.exp(p["s"])  # noqa: E731
    p, x = {"w": given((4, 4)), "s": given((4,), 1)}, given((2, 4), 2)
    program = qg.compile(fn, p, x, parameters=[0], target="cpu")
    assert any(n.stage == "prepare" for n in program.plan.graph.nodes)
    mine, theirs = (mx.grad(lambda p, f=f: f(p, x).sum())(p) for f in (program, fn))
    close([mine["w"], mine["s"]], [theirs["w"], theirs["s"]])
    prepared = program.prepare(p)
    close(
        [mx.grad(lambda x: program(prepared, x).sum())(x)], [mx.grad(lambda x: fn(p, x).sum())(x)]
    )
    close([mx.compile(program)(p, x)], [fn(p, x)])


def test_arrays_that_are_transformed_are_no_constants() -> None:
    def captures(w: mx.array) -> mx.array:
        return qg.jit(lambda x: x * w, target="cpu")(mx.ones(3)).sum()

    for transform in (mx.grad(captures), mx.compile(captures)):
        with pytest.raises(TraceError, match="w is being transformed by MLX"):
            transform(mx.ones(3))


def test_programs_made_inside_of_a_transformation() -> None:
    w = given((3, 3))

    def inside(x: mx.array) -> mx.array:
        return qg.jit(lambda x: qg.tanh(x @ w), target="cpu")(x).sum()

    close([mx.grad(inside)(w)], [mx.grad(lambda x: mx.tanh(x @ w).sum())(w)])
    close([mx.compile(inside)(w)], [mx.tanh(w @ w).sum()])


@pytest.fixture
def no_compile() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_without_compiling(no_compile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, "host-blas")
    x = given((4, 256))
    program = qg.compile(product, x, target="cpu")
    close([mx.grad(loss(program, x))(x)], [mx.grad(loss(product, x))(x)])
    tracers = Tracers()
    assert not tracers.among([x])
    found: list[bool] = []
    mx.vmap(lambda x: (found.append(tracers.among([x])), x)[1])(x)
    assert found == [True]


def test_gradients_leave_the_kernels_of_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, "host-blas")
    x = given((4, 256))
    program = qg.compile(product, x, target="cpu", passes=passes_without("form-regions"))
    calls: list[int] = []
    (step,) = [s for s in program.executables[0].lowered.steps if hasattr(s, "product")]
    own: Any = step.product
    monkeypatch.setattr(step, "product", lambda **given: (calls.append(1), own(**given))[1])
    program(x)
    assert len(calls) == 1
    mx.eval(mx.grad(loss(program, x))(x))
    before = len(calls)
    program(x)
    assert len(calls) == before + 1


class Adapted(nn.Module):
    """A frozen program with an adapter of low rank beside it."""

    def __init__(self, program: qg.Program, size: int, rank: int) -> None:
        super().__init__()
        self._program = program
        self.a = mx.random.normal((size, rank)) / rank
        self.b = mx.zeros((rank, size))

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self._program(x + (x @ self.a) @ self.b)
        return y


def test_adapters_before_a_packed_model_train(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, "host-blas")
    program = qg.jit(product, target="cpu")
    mx.random.seed(0)
    model = Adapted(program, 256, 4)
    x, y = given((16, 256)), given((16, 256), 1) / 10
    step = nn.value_and_grad(model, lambda x, y: nn.losses.mse_loss(model(x), y))
    _, found = step(x, y)
    dense = mx.dequantize(*PACKED)

    def by_hand(a: mx.array, b: mx.array) -> mx.array:
        return mx.mean(mx.square(mx.tanh((x + x @ a @ b) @ dense.T) - y))

    a, b = mx.grad(by_hand, argnums=(0, 1))(model.a, model.b)
    close([found["a"], found["b"]], [a, b])
    assert float(mx.abs(found["b"]).max()) > 0


def test_gradients_of_a_module_that_is_a_program_are_refused() -> None:
    mx.random.seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), given((3, 4))
    model.layers[0].freeze()
    weights = model.parameters()
    for program in (qg.compile(model, x, target="cpu"), qg.jit(model, target="cpu")):
        program(x)
        step = nn.value_and_grad(model, lambda x, p=program: p(x).sum())
        with pytest.raises(TraceError, match=r"gradients are asked of Linear\.(weight|bias)"):
            step(x)
        model.update(weights)  # MLX has left its tracers there
        close([mx.grad(lambda x, p=program: p(x).sum())(x)], [mx.grad(lambda x: model(x).sum())(x)])
    model.freeze()
    program = qg.compile(model, x, target="cpu")
    close([program(x)], [model(x)])


class Listed(nn.Module):
    """Weights in a list, in a dict and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.more = [given((4, 4), 5)], {"shift": given((4,), 6)}

    def __call__(self, x: Any) -> Any:
        return x @ self.steps[0] + self.more["shift"]


def of_a_call(model: nn.Module, x: mx.array) -> qg.Program:
    return qg.compile(lambda x: qg.call(model, x), x)


def of_a_loop(model: nn.Module, x: mx.array) -> qg.Program:
    return qg.compile(lambda x: qg.fori_loop(0, 1, lambda i, h: qg.call(model, h), x), x)


def of_an_import(model: nn.Module, x: mx.array) -> qg.Program:
    return qg.compile(qg.from_mlx(model, x))


def of_a_plan(model: nn.Module, x: mx.array) -> qg.Program:
    return qg.compile(qg.optimize(qg.from_mlx(lambda x: model(x), x)).graph)


def of_its_attributes(model: nn.Module, x: mx.array) -> qg.Program:
    """Read by a function that the traced one calls, and computed with before they are constants."""

    def product(x: Any) -> Any:
        if isinstance(model, nn.Linear):
            return x @ model.weight.T + model["bias"] * 1.0
        return model(x)

    return qg.compile(lambda x: product(x), x)


def of_a_jit(model: nn.Module, x: mx.array) -> qg.Program:
    program = qg.jit(lambda x: qg.call(model, x))
    program(x)
    return program


@pytest.mark.parametrize("make", [nn.Linear, Listed], ids=["linear", "listed"])
@pytest.mark.parametrize(
    "program_of",
    [of_a_call, of_a_loop, of_an_import, of_a_plan, of_its_attributes, of_a_jit],
)
def test_gradients_of_modules_that_a_program_holds_are_refused(
    program_of: Callable[[nn.Module, mx.array], qg.Program], make: Any
) -> None:
    mx.random.seed(0)
    model, x = make(*(4, 4) if make is nn.Linear else ()), given((3, 4))
    weights, program = model.parameters(), program_of(model, x)
    close([program(x)], [model(x)])
    step = nn.value_and_grad(model, lambda x: program(x).sum())
    with pytest.raises(TraceError, match=r"gradients are asked of (Linear|Listed).*a constant"):
        step(x)
    model.update(weights)
    close([mx.grad(lambda x: program(x).sum())(x)], [mx.grad(lambda x: model(x).sum())(x)])


def test_weights_that_changed_or_are_frozen_are_no_tracers() -> None:
    model, x = nn.Linear(4, 4), given((3, 4))
    program = qg.compile(lambda x: qg.call(model, x), x)
    before = program(x)
    model.weight = model.weight + 1
    close([program(x)], [before])
    model.freeze(keys="weight")
    with pytest.raises(TraceError, match=r"asked of Linear\.bias"):
        nn.value_and_grad(model, lambda: program(x).sum())()


def test_a_trace_leaves_modules_as_they_were() -> None:
    before = {**vars(nn.Module)}
    qg.trace(lambda x: qg.call(nn.Linear(4, 4), x), qg.spec((1, 4)))
    assert {**vars(nn.Module)} == before


def in_words(program: qg.Program, x: mx.array, path: Path) -> None:
    before = program(x)
    with pytest.raises(UnsupportedError, match="shapeless=True would run it for others"):
        mx.compile(program, shapeless=True)(x)
    with pytest.raises(UnsupportedError, match="shapeless=True would run it for others"):
        mx.export_function(str(path / "f.mlxfn"), lambda x: program(x), x, shapeless=True)
    close([program(x), mx.compile(program)(x)], [before, before])


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["mean", "ones_like", "softmax"])
def test_calls_for_all_shapes_are_refused(name: str, rows: int, tmp_path: Path) -> None:
    """An import of a mean multiplies by the number of its rows, one of `ones_like` holds them."""
    x = given((rows, 4))
    fn = lambda x: getattr(mx, name)(x) * x  # noqa: E731
    in_words(qg.compile(qg.from_mlx(fn, x)), x, tmp_path)
    in_words(qg.jit(lambda x: qg.call(fn, x)), x, tmp_path)


@pytest.mark.parametrize("rows", [1, 4])
def test_products_for_all_shapes_are_refused(rows: int, tmp_path: Path) -> None:
    x = given((rows, 256))
    in_words(qg.compile(product, x), x, tmp_path)
