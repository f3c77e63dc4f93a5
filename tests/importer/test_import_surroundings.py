"""What an import keeps besides numbers: lines, paths, names; MLX and modules as they were."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
import pkgutil
import threading
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg
import qgraph.importer
from qgraph.errors import UnsupportedError
from qgraph.importer.patches import _NOTED
from qgraph.inspection.lint import lint
from qgraph.passes import EliminateDeadCode, FuseQuantizedMatmul
from tests.importer.test_import import Block, X, agree
from tests.support.arrays import one_buffer


def importer_modules() -> list[Any]:
    names = [m.name for m in pkgutil.iter_modules(qgraph.importer.__path__)]
    return [importlib.import_module(f"qgraph.importer.{name}") for name in names]


def lines(graph: qg.Graph, op: str) -> list[str]:
    """The source lines that nodes of this op show."""
    return [n.origin.source() for n in graph.nodes if n.op == op]


def everything(x: mx.array) -> mx.array:
    y = x * 2
    y += mx.exp(x)
    y[0] = 7.0
    z = mx.compile(lambda a: mx.tanh(a))(y)
    parts = mx.split(z, 2, axis=1)
    return (mx.softmax(parts[0], axis=0) @ parts[1].T).at[1].add(3.0)


def test_nodes_show_the_users_line() -> None:
    graph = agree(everything, X)
    assert all(n.origin.file == __file__ for n in graph.nodes)
    for op, line in (
        ("multiply", "y = x * 2"),
        ("add", "y += mx.exp(x)"),
        ("exp", "y += mx.exp(x)"),
        ("at_set", "y[0] = 7.0"),
        ("tanh", "z = mx.compile(lambda a: mx.tanh(a))(y)"),
        ("split", "parts = mx.split(z, 2, axis=1)"),
        ("at_add", "return (mx.softmax(parts[0], axis=0) @ parts[1].T).at[1].add(3.0)"),
    ):
        assert lines(graph, op)[0] == line
    order = [n.origin.line for n in graph.nodes if n.op != "constant"]
    assert order == sorted(order)


def test_what_mlx_makes_of_a_call_shows_that_call() -> None:
    graph = qg.from_mlx(lambda x: mx.fast.rms_norm(x, None, 1e-5), X)
    assert graph.count() > 3
    assert {n.origin.line for n in graph.nodes} == {graph.nodes[-1].origin.line}


def test_modules_show_their_path() -> None:
    block = Block()
    graph = qg.from_mlx(block, mx.array([[1, 2, 3]]))
    product = next(n for n in graph.nodes if n.op == "addmm")
    assert product.origin.label == "head"
    assert product.origin.source() == "return self.head(nn.gelu(self.norm(h)))"
    weights = {n.args["name"]: str(n.origin) for n in graph.constants() if n.args["name"]}
    assert weights["head.weight"] == "head.weight"
    labels = {n.origin.label for n in graph.nodes if n.op == "matmul"}
    assert {"attention.query_proj", "attention.value_proj", "attention"} <= labels


def test_a_module_of_mlx_alone_shows_paths_in_place_of_lines() -> None:
    layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 40))
    graph = qg.from_mlx(layers, mx.ones((2, 64)))
    assert [str(n.origin) for n in graph.nodes if n.op == "addmm"] == ["layers.0", "layers.2"]
    assert any(line.endswith(" layers.2") for line in str(graph).splitlines())
    plan = qg.optimize(graph, target="cpu", quantize=qg.Quantize(4))
    assert any(line.endswith(" layers.2") for line in str(plan.graph).splitlines())
    fused = [str(entry) for entry in plan.ledger() if entry.decision == "fused"]
    assert ["layers.0" in entry for entry in fused] == [True, False]
    assert {str(f.origin) for f in lint(graph)} <= {"layers.0", "layers.1", "layers.2"}


def test_random_numbers_without_a_key_are_warned_of() -> None:
    dropout = nn.Dropout(0.5)
    with pytest.warns(UserWarning, match="without a key") as caught:
        qg.from_mlx(lambda x: dropout(x), X)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dropout.eval()
        qg.from_mlx(lambda x: dropout(x), X)
        qg.from_mlx(lambda k: mx.random.uniform(0, 1, (3,), mx.float32, k), mx.random.key(1))
        qg.from_mlx(lambda k: mx.random.normal((3,), key=mx.random.split(k)[0]), mx.random.key(1))


def test_compiled_functions_of_constants() -> None:
    """They would be one primitive, which MLX does not hand over."""
    window = mx.compile(lambda a: mx.exp(a) * 2 - a)
    graph = agree(lambda x: x * window(mx.arange(6.0)), X)
    assert graph.nodes[-1].origin.line
    assert mx.compile(lambda a: a * 2 + 1)(X).shape == X.shape
    agree(nn.Upsample(2.0, mode="cubic"), mx.ones((1, 4, 4, 3)))


def test_mlx_may_hand_over_a_primitive_before_what_it_reads() -> None:
    """As MLX 0.32.4 does where it merges the split inside of roll with another one."""
    agree(lambda x: [mx.roll(x, 2, axis=0), *mx.split(x, 2, axis=0)], X)


@pytest.mark.parametrize("module", importer_modules(), ids=lambda m: m.__name__.split(".")[-1])
def test_doctests(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def test_a_function_that_hides_from_the_notes_still_has_origins() -> None:
    tanh = mx.tanh
    layer = nn.Linear(6, 6)
    graph = qg.from_mlx(lambda x: tanh(tanh(layer(x))), X)
    assert [n.origin.label for n in graph.nodes if n.op == "addmm"] == ["layer"]


def test_errors_show_the_users_line() -> None:
    def conditional(x: mx.array) -> mx.array:
        total = x.sum()
        return x if total.item() > 0 else -x

    with pytest.raises(UnsupportedError) as caught:
        qg.from_mlx(conditional, X)
    assert caught.value.origin.source() == "return x if total.item() > 0 else -x"

    def distributed(x: mx.array) -> mx.array:
        y = x * 2
        return mx.fast.metal_kernel(
            name="mine", input_names=["a"], output_names=["b"], source="b[0] = a[0];"
        )(inputs=[y], output_shapes=[x.shape], output_dtypes=[x.dtype], grid=(1, 1, 1),
          threadgroup=(1, 1, 1))[0] + 1  # fmt: skip

    with pytest.raises(UnsupportedError, match="CustomKernel") as caught:
        qg.from_mlx(distributed, X)
    assert "mx.fast.metal_kernel(" in caught.value.origin.source()
    assert "keep the kernel outside" in caught.value.hint


def test_what_mlx_refuses_without_a_way_round_is_named() -> None:
    twice = mx.custom_function(lambda a: a * 2)  # made before the import, so it is as it is
    twice.vjp(lambda primals, cotangents, outputs: cotangents)
    with pytest.raises(UnsupportedError, match="uses CustomTransforms") as caught:
        qg.from_mlx(lambda x: twice(x), X)
    assert "itself" in caught.value.hint
    early = mx.linalg.lu
    with pytest.raises(UnsupportedError, match="uses LUF") as caught:
        qg.from_mlx(lambda x: early(x[:, :4], stream=mx.cpu), X)
    assert "write mx.linalg.lu(...)" in caught.value.hint


def test_mlx_is_put_back() -> None:
    before = [inspect.getattr_static(owner, name) for owner, name, _ in _NOTED]
    qg.from_mlx(everything, X)
    with pytest.raises(UnsupportedError):
        qg.from_mlx(lambda x: x.item(), X)
    after = [inspect.getattr_static(owner, name) for owner, name, _ in _NOTED]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_imports_in_several_threads() -> None:
    found: list[qg.Graph] = []
    threads = [
        threading.Thread(target=lambda: found.append(qg.from_mlx(everything, X))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({str(graph) for graph in found}) == 1
    assert len(found) == 4
    test_mlx_is_put_back()


class Remembering(nn.Module):
    """Keeps what it computes from its weight, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.ones((6, 6)) * 2
        self._doubled: Any = None

    def __call__(self, x: mx.array) -> mx.array:
        if self._doubled is None:
            self._doubled = self.weight * 2
        return x @ self._doubled


def test_modules_do_not_remember_the_import() -> None:
    module = Remembering()
    graph = agree(module, X)
    assert [n.args["name"] for n in graph.constants() if n.args["name"]] == ["weight"]
    fresh = Remembering()
    qg.from_mlx(fresh, X)
    assert fresh._doubled is None
    assert mx.array_equal(fresh(X), X @ (mx.ones((6, 6)) * 4))


LAZY = mx.random.normal((6, 6), key=mx.random.key(3))
TABLE = {"up": mx.ones((6, 3)), "down": [mx.ones((3, 6))]}


def names(graph: qg.Graph) -> set[str]:
    return {n.args["name"] for n in graph.constants() if n.args["name"]}


def test_variables_keep_their_names_and_are_not_computed_again() -> None:
    local = mx.load  # a local that is no array
    graph = agree(lambda x: (x @ LAZY) @ TABLE["up"] @ TABLE["down"][0], X)
    assert local is mx.load
    assert names(graph) == {"LAZY", "up", "down.0"}
    assert [n.op for n in graph.nodes if n.op != "constant"] == ["matmul"] * 3
    lazy = next(n for n in graph.constants() if n.args["name"] == "LAZY")
    assert one_buffer(lazy.args["data"].array, LAZY)


def test_modules_that_a_function_sees_keep_their_paths() -> None:
    block, ids = Block(), mx.array([[1, 2, 3]])
    assert "block.head.weight" in names(agree(lambda i: block(i) * 2, ids))
    assert "head.weight" in names(agree(block.__call__, ids))

    def scaled(factor: float, module: nn.Module, i: mx.array) -> mx.array:
        return module(i) * factor

    graph = agree(functools.partial(scaled, 2.0, block), ids)
    assert "x1.head.weight" in names(graph)


def test_an_argument_may_be_seen_as_a_variable_too() -> None:
    agree(lambda x: x + X, X)


@pytest.mark.parametrize("update", ["add", "rows", "in a list"])
def test_variables_are_not_updated_in_place(update: str) -> None:
    kept, held = mx.ones((4, 4)), [mx.ones((4, 4))]

    def f(x: mx.array) -> mx.array:
        y = kept
        if update == "add":
            y += x
        elif update == "rows":
            y[1:3] = x[1:3]
        else:
            held[0][0] = x[0]
        return y @ x

    with pytest.raises(UnsupportedError) as told:
        qg.from_mlx(f, mx.zeros((4, 4)))
    name = "held.0" if update == "in a list" else "kept"
    assert told.value.what.startswith(f"from_mlx: {name}, which the function sees as a variable")
    assert told.value.origin.source() in ("y += x", "y[1:3] = x[1:3]", "held[0][0] = x[0]")
    for array in (kept, *held):
        assert mx.array_equal(array, mx.ones((4, 4))).item()  # not left with the recording's arrays

    def g(x: mx.array) -> mx.array:
        y = kept + 0
        y += x
        y[0] = x[1]
        return y @ x

    agree(g, X[:4, :4])  # what the function makes itself may be updated


def test_loaded_weights_need_not_be_evaluated(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "w.safetensors"), {"w": mx.ones((6, 6))})
    loaded = mx.load(str(tmp_path / "w.safetensors"))
    weight = loaded["w"]  # type: ignore[index]
    graph = qg.from_mlx(lambda x: x @ weight, X)
    assert names(graph) == {"weight"}
    layer = nn.Linear(6, 6, bias=False)
    layer.weight = mx.load(str(tmp_path / "w.safetensors"))["w"]  # type: ignore[index]
    assert names(qg.from_mlx(layer, X)) == {"weight"}


@pytest.mark.parametrize("mode", ["mxfp8", "nvfp4"])
def test_captured_weights_packed_in_any_mode_need_not_be_evaluated(mode: str) -> None:
    w = mx.random.normal((32, 64), key=mx.random.key(5))
    packed, scales = mx.quantize(w, mode=mode)

    def f(x: mx.array) -> mx.array:
        return x @ mx.dequantize(packed, scales, mode=mode).T

    graph = agree(f, mx.ones((2, 64)))
    assert names(graph) == {"packed", "scales"}
    plan = qg.optimize(graph, target="cpu", passes=[FuseQuantizedMatmul(), EliminateDeadCode()])
    assert [n.op for n in plan.graph.nodes if n.op != "constant"] == ["quantized_matmul"]
    plan.check(mx.ones((2, 64)))


def test_settings_left_to_the_mode_are_filled_in() -> None:
    def f(x: mx.array) -> mx.array:
        return mx.dequantize(*mx.quantize(x, mode="mxfp8"), mode="mxfp8")

    graph = agree(f, mx.random.normal((2, 64), key=mx.random.key(6)))
    for node in graph.nodes:
        assert (node.args["group_size"], node.args["bits"]) == (32, 8)


def test_work_that_is_thrown_away_does_no_harm() -> None:
    def wasteful(x: mx.array) -> mx.array:
        mx.custom_function  # noqa: B018
        mx.vmap(lambda row: row * 2)(x)
        return mx.vmap(lambda row: mx.exp(row) + row)(x)

    assert {n.op for n in agree(wasteful, X).nodes} >= {"exp", "add"}


def test_gradients_are_imported() -> None:
    w = mx.random.normal((6, 6), key=mx.random.key(4))
    agree(lambda x: mx.grad(lambda a: mx.tanh(a @ w).sum())(x), X)
