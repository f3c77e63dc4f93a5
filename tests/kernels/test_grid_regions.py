"""Regions on CUDA: the very source, run by a CPU with all blocks at once, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.analysis.meshes import for_rank, is_collective
from qgraph.compiler.pipeline import default_passes
from qgraph.ir.graph import Graph, Node
from qgraph.ir.loops import REGION
from qgraph.kernels.choice.tuner import Choice
from qgraph.kernels.matmul.tiled.product import Tiled
from qgraph.kernels.matmul.tiled.untiled import Untiled
from qgraph.kernels.streams import Streams
from qgraph.passes import ChooseKernel, FormGridRegions
from qgraph.runtime.interpret import Interpreter
from qgraph.runtime.regions.cuda.held import refusal
from qgraph.target import Target
from tests.kernels.grid_on_cpu import OnCpu
from tests.support.arrays import to_numpy
from tests.support.faults import planted

CUDA = Target(mx.Device(mx.gpu, 0), "cuda", "sm_90", 4)
BLOCKS = 2
ORDERS: tuple[dict[str, bool], ...] = ({}, {"backwards": True, "late": True})


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`tiled` has a CPU's form, which types are inferred by, and bodies run."""
    monkeypatch.setattr(Tiled, "run", lambda self, *given: Untiled().run(*given))
    chosen = Choice(Tiled.name, "measured", 1.0)  # however small a product is
    monkeypatch.setattr("qgraph.passes.choose_kernel.choose", lambda *_, **__: chosen)
    with mx.stream(mx.cpu):
        yield


def planned(fn: Callable[..., Any], *specs: Any, mesh: qg.Mesh | None = None) -> qg.Plan:
    target = replace(CUDA, mesh=mesh)
    passes = [
        ChooseKernel(target, min_flops=0) if p.name == "choose-kernel" else p
        for p in default_passes(target)
        if p.name != "legalize"  # which knows MLX's kernels, and these products are small
    ]
    return qg.optimize(qg.trace(fn, *specs, name="f"), target=target, passes=passes)


def regions(graph: Graph) -> list[Node]:
    return [node for _, node in graph.walk() if node.op == REGION]


def mlp(weights: list[Any], norm: mx.array, settings: dict[str, Any]) -> Callable[..., Any]:
    """What stands between two attentions, small; of which each rank has some heads."""

    def fn(x: Any, h: Any) -> Any:
        h = h + qg.quantized_matmul(qg.shard(x, -1), *weights[0], **settings)
        y = qg.quantized_matmul(qg.fast.rms_norm(h, norm, 1e-5), *weights[1], **settings)
        gate, up = qg.split(y, 2, axis=-1)
        h = h + qg.quantized_matmul(gate * qg.sigmoid(gate) * up, *weights[2], **settings)
        return h, qg.fast.rms_norm(h, norm, 1e-5)

    return fn


def mlp_in_numpy(weights: list[Any], norm: Any, x: Any, h: Any) -> list[Any]:
    def normed(h: Any) -> Any:
        return h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5) * norm

    h = h + x @ weights[0].T
    gate, up = np.split(normed(h) @ weights[1].T, 2, axis=-1)
    h = h + (gate / (1 + np.exp(-gate)) * up) @ weights[2].T
    return [h, normed(h)]


@dataclass(frozen=True)
class Case:
    dtype: mx.Dtype
    mode: str
    bits: int
    group: int
    rows: int
    hidden: int = 256
    inner: int = 128

    def __str__(self) -> str:
        return f"{self.mode}{self.bits}-g{self.group}-{self.rows}x{self.hidden}"

    def build(self, mesh: qg.Mesh | None = None) -> tuple[qg.Plan, list[mx.array], list[Any], Any]:
        """The plan, packed inputs for its region's body, and float64's results."""
        sizes = [(self.hidden, self.inner), (4 * self.inner, self.hidden),
                 (self.hidden, 2 * self.inner)]  # fmt: skip
        settings = {"group_size": self.group, "bits": self.bits, "mode": self.mode}
        mx.random.seed(3)
        packed, dense = [], []
        for n, k in sizes:
            w = mx.quantize((mx.random.normal((n, k)) * k**-0.5).astype(self.dtype), **settings)
            packed.append(w)
            dense.append(to_numpy(mx.dequantize(*w, **settings, dtype=mx.float32)))
        norm = mx.random.uniform(0.5, 1.5, (self.hidden,)).astype(self.dtype)
        x = mx.random.normal((self.rows, self.inner)).astype(self.dtype)
        h = mx.random.normal((self.rows, self.hidden)).astype(self.dtype)
        specs = qg.spec(x.shape, x.dtype), qg.spec(h.shape, h.dtype)
        plan = planned(mlp(packed, norm, settings), *specs, mesh=mesh)
        wanted = mlp_in_numpy(dense, to_numpy(norm), to_numpy(x), to_numpy(h))
        return plan, [x, h], wanted, norm


CASES = [
    Case(mx.bfloat16, "affine", 4, 64, 1),
    Case(mx.float16, "affine", 8, 32, 3),
    Case(mx.bfloat16, "affine", 3, 128, 8),
    Case(mx.float16, "affine", 5, 64, 2, hidden=320),
    Case(mx.bfloat16, "affine", 6, 32, 1, hidden=96, inner=64),
    Case(mx.float16, "affine", 2, 64, 5, hidden=1088, inner=64),
    Case(mx.bfloat16, "mxfp4", 4, 32, 1),
    Case(mx.float16, "nvfp4", 4, 16, 4),
    Case(mx.bfloat16, "mxfp8", 8, 32, 2),
    Case(mx.bfloat16, "affine", 4, 64, 4, hidden=64, inner=7168),
]


def given(graph: Graph, region: Node, inputs: list[mx.array]) -> list[mx.array]:
    """Arrays for a region's inputs, weights packed."""
    streams = Streams(mx.Device(mx.cpu, 0))
    env: dict[Any, mx.array] = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        if node is region:
            break
        Interpreter(streams).run(node, env)
    return [env[v] for v in region.args["invariants"]]


def error(made: mx.array, wanted: Any) -> float:
    return float(np.linalg.norm(to_numpy(made) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case: Case, tmp_path: Path) -> None:
    plan, inputs, wanted, _ = case.build()
    (region,) = regions(plan.graph)
    arrays = given(plan.graph, region, inputs)
    native = OnCpu(region.bodies[0], tmp_path, BLOCKS)
    limit = 0.02 if case.dtype == mx.bfloat16 else 0.003
    for order in ORDERS:
        results = native(arrays, **order)
        assert results is not None
        assert native.left == []
        for made, right in zip(results, wanted, strict=True):
            assert error(made, right) < limit


@pytest.mark.parametrize("blocks", [1, 3])
def test_any_number_of_blocks(blocks: int, tmp_path: Path) -> None:
    plan, inputs, wanted, _ = CASES[0].build()
    (region,) = regions(plan.graph)
    results = OnCpu(region.bodies[0], tmp_path, blocks)(given(plan.graph, region, inputs))
    assert results is not None
    assert max(map(error, results, wanted)) < 0.02


MANY_PIECES = Case(mx.bfloat16, "affine", 4, 64, 1, inner=512)
"""More than the ring has slots."""

FAULTS = {
    "a barrier that nobody waits for": ("grid.wait([&]", "([](auto) {})([&]"),
    "a block that does not arrive": ("goal += gridDim.x;", "goal += gridDim.x + 1;"),
    "rows that are read before they are there": ("x1.fill<1>();\n__syncthreads();", ""),
    "tiles that are read before they are there": (
        "full == under_way &&",
        "full + 1 == under_way &&",
    ),
    "slots that are filled while they are read": ("(full < SLOTS)", "(full < SLOTS + 1)"),
    "sums that are read before they are there": ("      __syncthreads();\n      for", "      for"),
    "a barrier that is not set back": ("counters[0] = 0, counters[1] = 0;", ";"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    """In one of the orders: a number that is none, one that is wrong, a wait without an end."""
    plan, inputs, wanted, _ = MANY_PIECES.build()
    (region,) = regions(plan.graph)
    arrays = given(plan.graph, region, inputs)

    native = OnCpu(region.bodies[0], tmp_path, BLOCKS, planted(*FAULTS[fault]))
    caught = False
    for order in ORDERS:
        results = native(arrays, **order)
        fine = results is not None and native.left == []
        if not fine or not max(map(error, results or [], wanted)) < 0.02:
            caught = True
            break
    assert caught


# ---- Sums over the ranks of a mesh


def on_mesh(ranks: int, folder: Path, change: Callable[[str], str] = str) -> tuple[Any, ...]:
    """An MLP's region on several GPUs: its source, each rank's inputs, and float64's results."""
    case = Case(mx.bfloat16, "affine", 4, 64, 2, hidden=256, inner=64 * ranks)
    plan, inputs, wanted, _ = case.build(qg.Mesh(ranks, 0, "nccl"))
    arrays = []
    for rank in range(ranks):
        graph = for_rank(plan.graph, rank)
        (region,) = regions(graph)
        arrays.append(given(graph, region, inputs))
    assert sum(is_collective(node) for node in region.bodies[0].nodes) == 2
    return OnCpu(region.bodies[0], folder, BLOCKS, change, ranks), arrays, wanted


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_over_ranks(ranks: int, tmp_path: Path) -> None:
    """All find the same, from launch to launch, whichever half of the memory it takes."""
    native, arrays, wanted = on_mesh(ranks, tmp_path)
    for order in (*ORDERS, *ORDERS):
        results = native.on_ranks(arrays, **order)
        assert results is not None
        assert native.left == []
        for made, *others in zip(*results, strict=True):
            assert all(mx.array_equal(made, other).item() for other in others)
        assert max(map(error, results[0], wanted)) < 0.02


FAULTS_OF_MESHES = {
    "ranks that nobody waits for": ("peers.wait();", "__syncthreads();"),
    "a rank that does not tell": ("to < RANKS; to++)\n      store", "to < 1; to++)\n      store"),
    "blocks that nobody waits for": ("!= gridDim.x - 1) return;", "!= 0) return;"),
    "addends in one place": ("+ size_t(rank) * bytes", ""),
    "a count that is not set back": ("*count = 0;", ";"),
}


@pytest.mark.parametrize("fault", FAULTS_OF_MESHES)
def test_faults_on_meshes_are_caught(fault: str, tmp_path: Path) -> None:
    native, arrays, wanted = on_mesh(2, tmp_path, planted(*FAULTS_OF_MESHES[fault]))
    found = [native.on_ranks(arrays, **order) for order in ORDERS]
    assert not all(
        results is not None and max(map(error, results[0], wanted)) < 0.02 for results in found
    )


def test_meshes_without_peers_have_no_such_sums() -> None:
    """In one process nothing waits for another rank."""
    plan, *_ = Case(mx.bfloat16, "affine", 4, 64, 2, inner=128).build(qg.Mesh(2, backend="nccl"))
    assert not any(is_collective(n) for r in regions(plan.graph) for n in r.bodies[0].nodes)


# ---- Attention


@dataclass(frozen=True)
class Decoding:
    """Some layers of a decoder, of one token of each batch a turn."""

    dtype: mx.Dtype = mx.bfloat16
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    length: int = 40
    layers: int = 2

    @property
    def hidden(self) -> int:
        return self.heads * self.dim

    def weights(self) -> list[list[Any]]:
        mx.random.seed(5)
        kv = self.kv_heads * self.dim
        return [
            [mx.quantize(self._dense(n)) for n in (self.hidden, kv, kv, self.hidden)]
            for _ in range(self.layers)
        ]

    def _dense(self, n: int) -> mx.array:
        return (mx.random.normal((n, self.hidden)) * self.hidden**-0.5).astype(self.dtype)

    def decode(self, weights: list[list[Any]], turns: int) -> Callable[..., Any]:
        def heads(x: Any, w: Any, count: int) -> Any:
            y = qg.quantized_matmul(x, *w).reshape(self.batch, 1, count, self.dim)
            return y.transpose(0, 2, 1, 3)

        def rope(x: Any, position: Any) -> Any:
            return qg.fast.rope(
                x, self.dim, traditional=False, base=1e4, scale=1.0, offset=position
            )

        def layer(x: Any, w: Any, cache: Any, position: Any) -> Any:
            q, k, v = (
                heads(x, part, count)
                for part, count in zip(w, (self.heads, self.kv_heads, self.kv_heads), strict=False)
            )
            start = position.reshape(1)
            keys = qg.slice_update(cache[0], rope(k, position), start, axes=(2,))
            values = qg.slice_update(cache[1], v, start, axes=(2,))
            mask = qg.arange(self.length)[None, :] <= position
            y = qg.fast.scaled_dot_product_attention(
                rope(q, position), keys, values, scale=self.dim**-0.5, mask=mask
            )
            y = y.transpose(0, 2, 1, 3).reshape(self.batch, 1, self.hidden)
            return x + qg.quantized_matmul(y, *w[3]), (keys, values)

        def fn(x: Any, position: Any, caches: Any) -> Any:
            def turn(carry: Any, _: Any) -> Any:
                x, position, caches = carry
                after = []
                for w, cache in zip(weights, caches, strict=True):
                    x, kept = layer(x, w, cache, position)
                    after.append(kept)
                return (x, position + 1, after), x

            return qg.scan(turn, (x, position, caches), length=turns)

        return fn

    def inputs(self) -> list[Any]:
        shape = (self.batch, self.kv_heads, self.length, self.dim)
        caches = [tuple(mx.random.normal(shape).astype(self.dtype) for _ in "kv")
                  for _ in range(self.layers)]  # fmt: skip
        x = mx.random.normal((self.batch, 1, self.hidden)).astype(self.dtype)
        return [x, mx.array(self.length // 2, mx.int32), caches]


DECODING = [
    Decoding(),
    Decoding(mx.float16, batch=3, heads=2, length=520),  # keys shared out, and joined
    Decoding(dim=128, heads=4, kv_heads=1, length=600, layers=1),
]


@pytest.mark.parametrize("case", DECODING, ids=["short", "several rows", "long"])
def test_attention_is_a_phase(case: Decoding, tmp_path: Path) -> None:
    """Case 2: each region but the first begins with an attention, and gives what its body gives.
    What regions alone read lies in one array (`pack-results`)."""
    inputs = case.inputs()
    plan = planned(case.decode(case.weights(), 2), *inputs)
    found = regions(plan.graph)
    held = [[n.op for n in region.bodies[0].nodes] for region in found[-case.layers :]]
    assert all("tail_attention" in ops for ops in held)
    body = found[-1].bodies[0]
    mx.random.seed(11)
    arrays = [_like(value, case) for value in body.inputs]
    env: dict[Any, mx.array] = dict(zip(body.inputs, arrays, strict=True))
    for node in body.nodes:
        Interpreter(Streams(mx.Device(mx.cpu, 0))).run(node, env)
    native = OnCpu(body, tmp_path, BLOCKS)
    for order in ORDERS:
        results = native(arrays, **order)
        assert results is not None
        assert native.left == []
        for made, value in zip(results, body.outputs, strict=True):
            wanted = to_numpy(env[value])
            if value.dtype == mx.int32:
                assert made.tolist() == env[value].tolist()
            else:
                assert error(made, wanted) < 0.01


TAILS = {
    "neighbours": ([17, 18, 19, -1], 20, 20),
    "not neighbours": ([3, 30, -1, -1], 20, 33),
    "a position again": ([19, 20, 19, -1], 20, 20),
    "beyond the cache": ([38, 39, -1, -1], 40, 39),
    "no key is seen": ([-1, -1, -1, -1], 0, -1),
}
"""Positions of a tail, of the token, and the last that is seen."""


def test_attention_sees_the_tail_that_its_body_sees(tmp_path: Path) -> None:
    """Three queries share a key, in a cache of 40."""
    case = Decoding(mx.float16, heads=6, layers=1)
    plan = planned(case.decode(case.weights(), 4), *case.inputs())
    body = regions(plan.graph)[-1].bodies[0]
    (attention,) = [node for node in body.nodes if node.op == "tail_attention"]
    native = OnCpu(body, tmp_path, BLOCKS)
    for name, (tail, position, last) in TAILS.items():
        mx.random.seed(13)
        env = {value: _like(value, case) for value in body.inputs}
        env[attention.operand("tail_positions")] = mx.array(tail, mx.int32)
        for operand, number in (("position", position), ("last", last)):
            value = attention.operand(operand)
            env[value] = mx.full(value.shape, number, mx.int32)
        arrays = [env[value] for value in body.inputs]
        for node in body.nodes:
            Interpreter(Streams(mx.Device(mx.cpu, 0))).run(node, env)
        results = native(arrays)
        assert results is not None
        for made, value in zip(results, body.outputs, strict=True):
            if value.dtype == mx.int32:
                assert made.tolist() == env[value].tolist(), name
            else:
                assert error(made, to_numpy(env[value])) < 0.01, name


def test_positions_are_copied_to_where_launches_find_them() -> None:
    """MLX keeps up to 8 bytes where the host is; once a program, and nothing else."""
    interpreter = Interpreter(Streams(mx.Device(mx.cpu, 0)))
    position, row = mx.array([[7]], mx.int32), mx.zeros((1, 8))
    copy = interpreter._nearby(position)
    assert copy.tolist() == [7] * 4
    assert interpreter._nearby(position) is copy
    assert interpreter._nearby(row) is row


def _like(value: Any, case: Decoding) -> mx.array:
    """An array for an input of a region: positions, words of a weight, or numbers."""
    if value.dtype == mx.int32 and value.type.size > 1:
        return mx.array([case.length // 2 - 1, *[-1] * (value.type.size - 1)], mx.int32)
    if value.dtype == mx.int32:
        return mx.full(value.shape, case.length // 2, mx.int32)
    if value.dtype == mx.uint32 and value.ndim == 3 and value.shape[-1] == 64:  # scales and biases
        scale, bias = (mx.random.uniform(low, high, value.shape).astype(case.dtype).view(mx.uint16)
                       for low, high in ((0.01, 0.02), (-0.15, -0.1)))  # fmt: skip
        return scale.astype(mx.uint32) | bias.astype(mx.uint32) << 16
    if value.dtype == mx.uint32:
        return mx.random.randint(0, 1 << 31, value.shape).astype(mx.uint32)
    return mx.random.normal(value.shape).astype(value.dtype)


# ---- Which regions are formed


def linear(n: int, k: int, dtype: mx.Dtype = mx.bfloat16) -> Any:
    mx.random.seed(1)
    return mx.quantize(mx.random.normal((n, k)).astype(dtype), group_size=64, bits=4)


def test_a_region_ends_where_something_else_is_waited_for() -> None:
    """Case 1; near misses 2 and 3: a softmax has no phase, and a product alone stays as it is."""
    first, second, third = linear(128, 64), linear(64, 128), linear(64, 64)

    def fn(x: Any) -> Any:
        y = qg.quantized_matmul(qg.sigmoid(qg.quantized_matmul(x, *first)), *second)
        return qg.quantized_matmul(qg.softmax(y + x, axis=-1), *third)

    plan = planned(fn, qg.spec((2, 64), mx.bfloat16))
    (region,) = regions(plan.graph)
    assert [n.op for n in region.bodies[0].nodes] == [
        "packed_matmul", "sigmoid", "packed_matmul", "add",
    ]  # fmt: skip
    assert region.kernel == "grid"
    assert [n.op for n in plan.graph.nodes if n.stage == "run" and n.op != "constant"] == [
        "region", "softmax", "packed_matmul",
    ]  # fmt: skip
    told = [str(e) for step in plan.steps for e in step.entries if step.name == "form-grid-regions"]
    assert any("it ends before softmax: there is no phase for softmax" in text for text in told)


def test_a_row_without_its_axes_is_a_result(tmp_path: Path) -> None:
    """It is none of those that lie in one array (`pack-results`)."""
    first, second = linear(128, 64), linear(64, 128)

    def fn(x: Any) -> Any:
        y = qg.quantized_matmul(qg.sigmoid(qg.quantized_matmul(x, *first)), *second)
        return y.reshape(64)

    mx.random.seed(2)
    x = mx.random.normal((1, 64)).astype(mx.bfloat16)
    plan = planned(fn, qg.spec(x.shape, x.dtype))
    (region,) = regions(plan.graph)
    results = OnCpu(region.bodies[0], tmp_path, BLOCKS)(given(plan.graph, region, [x]))
    assert results is not None
    y = to_numpy(x) @ to_numpy(mx.dequantize(*first)).T
    wanted = 1 / (1 + np.exp(-y)) @ to_numpy(mx.dequantize(*second)).T
    assert error(results[0], wanted.reshape(64)) < 0.02


def test_in_a_loop() -> None:
    w = linear(64, 64)

    def fn(x: Any) -> Any:
        return qg.fori_loop(0, 3, lambda i, h: h + qg.quantized_matmul(qg.tanh(h), *w), x)

    (region,) = regions(planned(fn, qg.spec((1, 64), mx.bfloat16)).graph)
    assert [n.op for n in region.bodies[0].nodes] == ["tanh", "packed_matmul", "add"]


@pytest.mark.parametrize(
    ("rows", "width", "why"),
    [(9, 64, "9 rows; up to 8 cost the same as one"), (8, 16384, "do not fit in shared memory")],
)
def test_what_has_no_place(rows: int, width: int, why: str) -> None:
    """Near misses 3 and 4."""
    wide, narrow = linear(width, 64), linear(64, width)

    def fn(x: Any) -> Any:
        return x + qg.quantized_matmul(qg.sigmoid(qg.quantized_matmul(x, *wide)), *narrow)

    plan = planned(fn, qg.spec((rows, 64), mx.bfloat16))
    assert not regions(plan.graph)
    product = next(n for n in plan.graph.nodes if n.op == "packed_matmul")
    told = [str(e) for step in plan.steps for e in step.entries if step.name == "form-grid-regions"]
    assert why in str(refusal(product)) or any(why in text for text in told)


def test_where_a_region_is_not_launched_its_body_runs_and_the_ledger_says_so() -> None:
    plan, inputs, wanted, _ = Case(mx.bfloat16, "affine", 4, 64, 1).build()
    program = qg.compile(plan.graph, passes=[], target="cpu")
    for made, want in zip(program(*inputs), wanted, strict=True):
        assert error(made, want) < 2e-2
    said = [e for e in program.plan.ledger() if e.made_by == "lowering"]
    assert [e.decision for e in said] == ["refused"]
    assert "it runs by its body: it was formed for a GPU" in said[0].reason
    assert said[0].reason in program.plan.report()


def test_other_targets_have_none() -> None:
    graph = planned(lambda x: qg.exp(x) + 1, qg.spec((1, 64), mx.bfloat16)).graph
    assert FormGridRegions(Target(mx.Device(mx.cpu, 0), "cpu", "x86_64", 1))(graph) is graph


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32])
def test_the_greatest_of_each_row(dtype: mx.Dtype, tmp_path: Path) -> None:
    """Case 3: its place, the first of several, by whichever block; NaN is not one.  A view of the
    rows ends no region."""
    w, rows = linear(4096 + 64, 64), 3
    mask = mx.zeros((rows, 4096 + 64), mx.bfloat16)
    mask[0, 4150], mask[1, 17], mask[1, 4120], mask[2] = 1e4, 1e4, 1e4, float("nan")

    def fn(x: Any, mask: Any) -> Any:
        logits = qg.maximum(qg.quantized_matmul(x, *w)[:, 0] * 0.0, mask)
        return qg.argmax(logits, axis=-1).astype(dtype), logits

    x = mx.random.normal((rows, 1, 64)).astype(mx.bfloat16)
    plan = planned(fn, qg.spec(x.shape, x.dtype), qg.spec(mask.shape, mask.dtype))
    (region,) = regions(plan.graph)
    assert "argmax" in [n.op for n in region.bodies[0].nodes]
    native = OnCpu(region.bodies[0], tmp_path, 4)
    results = native(given(plan.graph, region, [x, mask]))
    assert results is not None
    (places,) = (made for made in results if made.dtype == dtype)
    assert places.tolist() == [4150, 17, 0]


def test_a_norm_of_a_norm_and_uneven_splits(tmp_path: Path) -> None:
    """What follows a norm is computed where it is read; parts of different widths from memory."""
    first, second = linear(192, 64), linear(64, 64)
    norm = mx.random.uniform(0.5, 1.5, (64,)).astype(mx.bfloat16)

    def fn(x: Any) -> Any:
        wide, narrow = qg.split(qg.quantized_matmul(x, *first), [128], axis=-1)
        h = x + qg.fast.rms_norm(narrow, norm, 1e-5)
        y = qg.quantized_matmul(qg.fast.rms_norm(h, norm, 1e-5), *second)
        return qg.maximum(y, 0.0) * 2.0 + h, wide * 0.5

    plan = planned(fn, qg.spec((2, 64), mx.bfloat16))
    (region,) = regions(plan.graph)
    x = mx.random.normal((2, 64)).astype(mx.bfloat16)
    results = OnCpu(region.bodies[0], tmp_path, BLOCKS)(given(plan.graph, region, [x]))
    a, b = (to_numpy(mx.dequantize(*w, group_size=64, bits=4, dtype=mx.float32))
            for w in (first, second))  # fmt: skip

    def normed(h: Any) -> Any:
        return h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5) * to_numpy(norm)

    y = to_numpy(x) @ a.T
    h = to_numpy(x) + normed(y[:, 128:])
    wanted = np.maximum(normed(h) @ b.T, 0) * 2 + h, y[:, :128] * 0.5
    assert results is not None
    assert max(map(error, results, wanted)) < 0.02


def test_heads_end_no_region_and_gelu_goes_into_it(tmp_path: Path) -> None:
    """Near miss 6: norms of heads have other rows than the products beside them."""
    first, second = linear(192, 64), linear(64, 64)
    norm = mx.random.uniform(0.5, 1.5, (32,)).astype(mx.bfloat16)

    def fn(x: Any) -> Any:
        wide, narrow = qg.split(qg.quantized_matmul(x, *first), [128], axis=-1)
        heads = qg.fast.rms_norm(qg.reshape(wide, (4, 32)), norm, 1e-5)
        gelu = 0.5 * narrow * (1 + qg.tanh(0.8 * (narrow + 0.045 * narrow**3)))
        return heads, qg.quantized_matmul(gelu, *second)

    plan = planned(fn, qg.spec((1, 64), mx.bfloat16))
    (region,) = regions(plan.graph)
    assert "power" in [n.op for n in region.bodies[0].nodes]
    assert "fast.rms_norm" in [n.op for n in plan.graph.nodes]
    x = mx.random.normal((1, 64)).astype(mx.bfloat16)
    results = OnCpu(region.bodies[0], tmp_path, BLOCKS)(given(plan.graph, region, [x]))
    a, b = (to_numpy(mx.dequantize(*w, group_size=64, bits=4, dtype=mx.float32))
            for w in (first, second))  # fmt: skip
    y = to_numpy(x) @ a.T
    narrow = y[:, 128:]
    gelu = 0.5 * narrow * (1 + np.tanh(0.8 * (narrow + 0.045 * narrow**3)))
    assert results is not None
    assert max(map(error, results, (y[:, :128], gelu @ b.T))) < 0.02
