"""`fold-scales`: factors of channels move where that changes nothing, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph as qg
from qgraph.passes import FoldScales
from qgraph.passes.shared.channels import Refused, follow
from qgraph.rewrite.ledger import collecting

RNG = np.random.default_rng(5)


N, H = 8, 12
ARRAYS = {
    "norm": RNG.uniform(0.5, 2, N), "shift": RNG.normal(size=N), "gate": RNG.normal(size=(H, N)),
    "up": RNG.normal(size=(H, N)), "down": RNG.normal(size=(N, H)), "bias": RNG.normal(size=H),
    "out": RNG.normal(size=(6, N)),
}  # fmt: skip
norm, shift, gate, up, down, bias, out = (
    mx.array(ARRAYS[name].astype(np.float32))
    for name in ("norm", "shift", "gate", "up", "down", "bias", "out")
)
square = mx.array(RNG.normal(size=(N // 2, N // 2)).astype(np.float32))
A = {name: a.astype(np.float32).astype(np.float64) for name, a in ARRAYS.items()}
X = RNG.normal(size=(2, 3, N)).astype(np.float32)


def traced(fn: Callable[..., Any], *specs: Any) -> Any:
    return qg.trace(fn, *(specs or (qg.spec(X.shape),)))


def constant(graph: Any, name: str) -> Any:
    return next(n.output for n in graph.constants() if n.args["name"] == name)


def normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def layer_normed(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def by_hand(x: Any) -> Any:
    """An RMS norm of primitives, as a model may spell it."""
    x = x * qg.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
    return (x * norm) @ out.T


def gated(x: Any) -> Any:
    h = x @ gate.T
    return (h * qg.sigmoid(h) * (x @ up.T)) @ down.T


CASES: dict[str, tuple[str, Callable[[Any], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "rms norm, two readers": (
        "norm",
        lambda x: [qg.fast.rms_norm(x, norm, 1e-5) @ w.T for w in (gate, up)][1],
        lambda x: normed(x) * A["norm"] @ A["up"].T,
    ),
    "layer norm with a bias": (
        "norm",
        lambda x: qg.fast.layer_norm(x, norm, shift, 1e-5) @ out.T,
        lambda x: (layer_normed(x) * A["norm"] + A["shift"]) @ A["out"].T,
    ),
    "a norm by hand": ("norm", by_hand, lambda x: normed(x) * A["norm"] @ A["out"].T),
    "rows, through an elementwise product": (
        "up", gated,
        lambda x: (silu(x @ A["gate"].T) * (x @ A["up"].T)) @ A["down"].T,
    ),
    "rows and a bias that is added": (
        "up",
        lambda x: qg.addmm(bias, x, up.T) @ down.T,
        lambda x: (x @ A["up"].T + A["bias"]) @ A["down"].T,
    ),
    "through views, casts and picked rows": (
        "norm",
        lambda x: (
            qg.fast.rms_norm(x, norm, 1e-5).reshape(-1, 2, N // 2).reshape(-1, N)[
                qg.tensor(mx.array([4, 0]))
            ][None].astype(mx.float32) @ out.T
        ),
        lambda x: (normed(x) * A["norm"]).reshape(-1, N)[[4, 0]][None] @ A["out"].T,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays_and_constants_change(case: str) -> None:
    name, fn, wanted = CASES[case]
    graph = traced(fn)
    count = follow(graph, constant(graph, name)).count
    factors = RNG.uniform(0.2, 5, count).astype(np.float32)
    folded = FoldScales({name: mx.array(factors)})(graph)
    assert folded is not graph
    assert [n.op for n in folded.nodes] == [n.op for n in graph.nodes]
    before, after = (np.array(constant(g, name).node.args["data"].array) for g in (graph, folded))
    by = factors if before.ndim == 1 else factors[:, None]
    np.testing.assert_allclose(after, before / by, rtol=1e-6)
    result = qg.compile(folded)(mx.array(X))
    np.testing.assert_allclose(np.array(result), wanted(X.astype(np.float64)), rtol=2e-4, atol=2e-4)


def test_text_before_and_after() -> None:
    graph = traced(CASES["layer norm with a bias"][1])
    plan = qg.optimize(graph, passes=[FoldScales({"norm": mx.full((N,), 2.0)})])
    assert plan.graph.format(origins=False) == graph.format(origins=False)
    (entry,) = [e for e in plan.ledger() if e.made_by == "fold-scales"]
    assert "divided by factors that multiply out" in str(entry)
    doubled = constant(plan.graph, "out").node.args["data"].array
    np.testing.assert_allclose(np.array(doubled), 2 * A["out"], rtol=1e-6)


def near(fn: Callable[[Any], Any]) -> Any:
    return lambda x: fn(qg.fast.rms_norm(x, norm, 1e-5))


def two_outputs(x: Any) -> Any:
    y = qg.fast.rms_norm(x, norm, 1e-5)
    return y @ out.T, y


def looped(x: Any) -> Any:
    y = qg.fast.rms_norm(x, norm, 1e-5)
    return qg.fori_loop(0, 2, lambda i, h: h + y, y)


NEAR_MISSES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "no factor commutes with it": ("norm", near(lambda y: qg.tanh(y) @ out.T), "tanh does not"),
    "a square": ("norm", near(lambda y: (y * y) @ out.T), "reads it as a and b"),
    "a residual": ("norm", lambda x: near(lambda y: (y + x) @ out.T)(x), "no constant"),
    "another reader": (
        "norm", near(lambda y: (y @ out.T).sum() + qg.exp(y).sum()), "exp does not commute",
    ),
    "another reader of the weight at the end": (
        "norm", lambda x: near(lambda y: y @ out.T)(x).sum() + (x[0, 0, 0] * out).sum(),
        "multiply reads out too",
    ),
    "the bias is read elsewhere": (
        "norm",
        lambda x: qg.fast.layer_norm(x, norm, shift, 1e-5) @ out.T + shift[:6],
        "read elsewhere",
    ),
    "attention": ("norm", near(lambda y: y @ y.swapaxes(-1, -2)), "reads it as a and b"),
    "values that a cache may keep": (
        "out", lambda x: qg.softmax(x @ x.swapaxes(-1, -2)) @ (x @ out.T) @ gate[:, :6].T,
        "change from call to call",
    ),
    "a slice of the weight": ("norm", near(lambda y: y @ out[1:3].T), "no weight"),
    "channels are picked": (
        "norm", near(lambda y: y[..., :4] @ out[:, :4].T), "among channels",
    ),
    "channels in another order": (
        "norm", near(lambda y: y.reshape(-1, N // 2, 2).swapaxes(1, 2) @ square.T),
        "different orders",
    ),
    "it is a result": ("norm", two_outputs, "it is a result"),
    "a loop reads it": ("norm", looped, "loops are not followed"),
    "the weight is normalized": (
        "up", lambda x: qg.fast.rms_norm(x @ up.T, None, 1e-5) @ down.T, "reads it as x",
    ),
    "nothing multiplies it": ("norm", near(lambda y: (y * 2).sum(axis=-1)), "sum does not commute"),
    "rows that are looked up": ("gate", lambda x: gate[qg.tensor(mx.array([1, 2]))] * x[0, :2],
                                "among channels"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_stay_and_say_why(case: str) -> None:
    name, fn, words = NEAR_MISSES[case]
    graph = traced(fn)
    with pytest.raises(Refused, match=words):
        follow(graph, constant(graph, name))
    with collecting() as entries:
        assert FoldScales({name: mx.full((20,), 2.0)})(graph) is graph
    assert [e.decision for e in entries] == ["refused"]
    assert words in str(entries[0])


def test_a_name_or_a_number_of_factors_that_does_not_fit_is_said() -> None:
    graph = traced(CASES["a norm by hand"][1])
    with collecting() as entries:
        assert FoldScales({"other": mx.ones(8), "norm": mx.ones(5)})(graph) is graph
    assert [e.reason for e in entries] == [
        "no constant has this name",
        "its factors stay where they are: it has 8 channels, and there are 5 factors",
    ]


class Experts(nn.Module):
    """A norm that a router and two stacks of experts read, by way of rows in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.RMSNorm(N), nn.Linear(N, 4, bias=False)
        self.up, self.down = mx.random.normal((4, H, N)), mx.random.normal((4, N, H))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.norm(x)
        best = mx.argmax(self.router(y), axis=-1)
        rows = mx.expand_dims(y, -2)
        up = mx.gather_mm(rows, self.up.swapaxes(-1, -2), rhs_indices=best)
        return x + mx.gather_mm(up, self.down.swapaxes(-1, -2), rhs_indices=best).squeeze(-2)


def test_experts_share_factors() -> None:
    mx.random.seed(1)
    model, x = Experts(), mx.random.normal((5, N))
    graph = qg.from_mlx(model, x)
    factors = {n: mx.random.uniform(0.2, 5, (k,)) for n, k in (("norm.weight", N), ("up", H))}
    channels = follow(graph, constant(graph, "norm.weight"))
    ends = {v.node.args["name"] for v in channels.multiplied}
    assert ends == {"router.weight", "up"}
    folded = FoldScales(factors)(graph)
    for name in ("norm.weight", "up", "down"):
        parts = [constant(g, name).node.args["data"].array for g in (graph, folded)]
        assert not mx.allclose(*parts)
    assert mx.allclose(qg.compile(folded)(x), model(x), atol=1e-4)


def test_the_mark_of_a_scaled_weight_is_known_without_it() -> None:
    from qgraph.quantization.fitted import mark_of

    weight = mx.random.normal((96, 128), key=mx.random.key(0)).astype(mx.bfloat16)
    norm = mx.ones(128, mx.bfloat16)
    graph = qg.trace(
        lambda x: qg.fast.rms_norm(x, norm, 1e-5) @ weight.T, qg.spec((1, 128), mx.bfloat16)
    )
    names = [n.args["name"] for n in graph.constants()]
    folded = FoldScales({"norm": mx.random.uniform(0.2, 5, (128,))})(graph)
    data = constant(folded, "weight").node.args["data"]
    assert {"norm", "weight"} <= {*names}
    assert data.mark() == mark_of(data.array) != mark_of(weight)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.sampled_from(["norm", "up"]), min_size=1, unique=True))
def test_random_factors_on_several_weights_at_once(seed: int, names: list[str]) -> None:
    random = np.random.default_rng(seed)

    def fn(x: Any) -> Any:
        return gated(qg.fast.rms_norm(x, norm, 1e-5))

    graph = traced(fn)
    count = {"norm": N, "up": H}
    factors = {n: mx.array(np.exp(random.normal(size=count[n])).astype(np.float32)) for n in names}
    result = np.array(qg.compile(FoldScales(factors)(graph))(mx.array(X)))
    y = normed(X.astype(np.float64)) * A["norm"]
    wanted = (silu(y @ A["gate"].T) * (y @ A["up"].T)) @ A["down"].T
    np.testing.assert_allclose(result, wanted, rtol=1e-3, atol=1e-3)
