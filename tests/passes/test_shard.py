"""Graphs spread over meshes in one process give what one device gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qgraph as qg
from qgraph.analysis.meshes import in_one_process, is_collective, is_spread
from qgraph.analysis.placements.rules import has_answer
from qgraph.examples import smollm2_files as files
from qgraph.examples.smollm2 import Llama
from qgraph.ir.graph import Graph
from qgraph.ir.ops import OPS
from qgraph.mesh import LINKS, Link
from qgraph.passes import Shard
from qgraph.target import Target, as_target, on_mesh
from tests.support import mesh_zoo, reference, zoo
from tests.support.arrays import to_numpy
from tests.support.fusion import random
from tests.support.random_graphs import FORMATS, ROWS, K, parameters, programs
from tests.support.random_graphs import run as run_program

RANKS = (2, 3, 4, 8)


def spread(graph: Graph, ranks: int) -> Graph:
    """What the pass alone makes of a graph."""
    target = on_mesh(as_target("cpu"), qg.Mesh(ranks))
    after: Graph = Shard(target)(graph)
    qg.optimize(after, passes=[], target="cpu")  # verified
    return after


def talks(graph: Graph) -> Counter[str]:
    """The collectives of a graph, by name."""
    return Counter(n.op.partition(".")[2] for _, n in graph.walk() if is_collective(n))


def agrees(graph: Graph, ranks: int, *arrays: mx.array, within: float = 1e-5) -> Graph:
    """The spread graph, which gives in float32 what the graph gives."""
    after = spread(graph, ranks)
    together = in_one_process(after, ranks) if is_spread(after) else after
    with mx.stream(mx.cpu):
        wanted, actual = mesh_zoo.run(graph, *arrays), mesh_zoo.run(together, *arrays)
    for one, mesh in zip(wanted, actual, strict=True):
        assert (one.shape, one.dtype) == (mesh.shape, mesh.dtype)
        assert reference.relative_error(to_numpy(mesh), to_numpy(one)) < within
    return after


def traced(fn: Callable[..., Any], *arrays: mx.array) -> Graph:
    return qg.trace(fn, *arrays, name="f")


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_has_an_answer(name: str) -> None:
    """A new op gets a rule, or stands among those that every rank carries out whole."""
    assert has_answer(name), f"say in analysis/placements/rules.py how {name} lies on a mesh"


def mlp(form: str, hidden: int = 3 * 128) -> Callable[[Any], Any]:
    options = FORMATS[form]
    up, gate = (mx.quantize(random(hidden, K, seed=i) / 12, **options) for i in (1, 2))
    down = mx.quantize(random(K, hidden, seed=3) / 20, **options)
    norm, bias = random(K, seed=4), random(K, seed=5)

    def layer(x: Any) -> Any:
        h = qg.fast.rms_norm(x, norm, 1e-5)
        a = qg.quantized_matmul(h, *gate, **options)
        y = a * qg.sigmoid(a) * qg.quantized_matmul(h, *up, **options)
        return x + qg.quantized_matmul(y, *down, **options) + bias

    return lambda x: layer(layer(x))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("form", FORMATS)
def test_mlp(form: str, ranks: int) -> None:
    """Up and gate by rows, down by whole groups of columns: one all_sum a layer, no more."""
    x = random(ROWS, K, seed=9)
    after = agrees(traced(mlp(form), x), ranks, x)
    assert talks(after) == {"all_sum": 2}
    whole = [n for n in after.constants() if n.output.ndim > 1]
    for node in whole:
        assert {user.op for user in after.users[node.output]} == {"distributed.part"}


def test_dense_layers_of_any_size() -> None:
    """Sizes that no mesh divides: parts reach beyond the end, and nothing of that is summed."""
    w1, w2, b = random(50, 30, seed=1), random(30, 50, seed=2), random(50, seed=3)

    def fn(x: Any) -> Any:
        h = qg.exp(qg.tensor(x) @ w1.T + b)  # exp of what stands beyond the end is 1, not 0
        return (1 / h) @ w2.T + qg.sum(qg.log(h), axis=-1, keepdims=True)

    x = random(4, 30, seed=5) / 4
    for ranks in RANKS:
        after = agrees(traced(fn, x), ranks, x)
        assert talks(after)["all_gather"] == 0


@pytest.mark.parametrize("ranks", RANKS)
def test_llama(ranks: int) -> None:
    """The toy model's prompt and its decode loop: two collectives a layer, caches by heads."""
    found = files.toy()
    llama = Llama(found.config, found.weights, length=32)
    tokens, count = mx.array([[5, 17, 9, 33]]), mx.array(4, mx.int32)
    cache = llama.empty_cache()
    arrays = qg.tree.flatten(((tokens, count, cache), {}), static=True)[0]
    agrees(traced(llama.prefill, tokens, count, cache), ranks, *arrays)
    key = mx.random.key(0)
    graph = traced(llama.decode(3), count, count, key, cache)
    arrays = qg.tree.flatten(((count, count, key, cache), {}), static=True)[0]
    after = agrees(graph, ranks, *arrays)
    (loop,) = [n for n in after.nodes if n.op == "scan"]
    assert talks(loop.bodies[0])["all_sum"] == 2 * found.config.layers + 1  # and the embedding
    shares = {v.shape[1] for v in loop.bodies[0].inputs if v.ndim == 4}
    assert shares == {-(-found.config.kv_heads // ranks)}


MODELS = ("mixtral", "qwen3_moe", "gpt_oss", "gemma3_text", "mamba2", "deepseek_v2", "olmo2")


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    """Of mlx-lm; all of them, on 2, 3, 4 and 8 ranks: `python -m tests.support.mesh_zoo`."""
    model = zoo.build(name)
    ids, _ = zoo.inputs(name)
    graph = qg.from_mlx(model, ids)
    after = agrees(graph, 3, ids)
    assert mesh_zoo.held(after) < 0.6


A_LAYER = {"llama": 2, "phi3": 2, "gpt2": 2, "starcoder2": 2, "phi": 1, "gpt_neox": 1}
"""All_sums of a layer: of its attention and its MLP, or one of both where they stand side by side.

Q, K and V may come of one product.
"""


@pytest.mark.parametrize("name", A_LAYER)
def test_collectives_of_a_layer(name: str) -> None:
    ids, _ = zoo.inputs(name)
    with mx.stream(mx.cpu):
        away, plan, _ = mesh_zoo.compare(qg.from_mlx(zoo.build(name), ids), 2, ids)
    assert away < 1e-5
    after = next(step.after for step in plan.steps if step.name == "shard")
    # And one for the embedding, one for the logits.
    assert talks(after) == {"all_sum": zoo.LAYERS * A_LAYER[name], "all_gather": 2}
    assert mesh_zoo.held(after) < 0.6


def test_convolutions() -> None:
    w1, w2 = random(16, 3, 3, 6, seed=1), random(5, 3, 3, 16, seed=2)
    deep = random(16, 3, 3, 1, seed=3)

    def fn(x: Any) -> Any:
        y = qg.maximum(qg.conv2d(x, w1, padding=1), 0)
        y = qg.conv2d(y, deep, padding=1, groups=16)
        return qg.conv2d(y, w2)

    x = random(2, 8, 8, 6, seed=4)
    for ranks in RANKS:
        after = agrees(traced(fn, x), ranks, x)
        assert talks(after) == {"all_sum": 1}


def test_experts() -> None:
    """Whole experts or parts of each, whichever is cheaper; scores are weighed before the sum."""
    up, down = random(6, 64, 32, seed=1), random(6, 32, 64, seed=2)
    gate = random(6, 32, seed=3)

    def fn(x: Any) -> Any:
        scores = qg.softmax(qg.tensor(x) @ gate.T, axis=-1)
        picked = qg.argpartition(-scores, kth=1, axis=-1)[..., :2]
        h = qg.gather_mm(
            qg.expand_dims(x, (-2, -3)), qg.swapaxes(qg.tensor(up), 1, 2), rhs_indices=picked
        )
        y = qg.gather_mm(qg.tanh(h), qg.swapaxes(qg.tensor(down), 1, 2), rhs_indices=picked)
        weighed = qg.squeeze(y, -2) * qg.take_along_axis(scores, picked, axis=-1)[..., None]
        return qg.sum(weighed, axis=-2)

    x = random(5, 32, seed=4)
    for ranks in RANKS:
        after = agrees(traced(fn, x), ranks, x)
        assert mesh_zoo.held(after) <= 0.67


VOCABULARY = 1000
HEAD = random(VOCABULARY, 64, seed=1)
HEADS: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda y: qg.argmax(y, axis=-1),
    "argmin": lambda y: qg.argmin(y, axis=-1, keepdims=True),
    "sampled": lambda y: qg.random.categorical(y / 3, key=mx.random.key(3)),
    "max": lambda y: qg.max(y, axis=-1),
    "min": lambda y: qg.min(qg.exp(y / 9), axis=-1, keepdims=True),
    "mean": lambda y: qg.mean(qg.exp(y / 9), axis=-1),
    "sum": lambda y: qg.sum(qg.exp(y / 9), axis=-1),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_split_vocabulary_is_not_gathered(name: str) -> None:
    """Each rank sends a few numbers a row, also where its part reaches beyond the vocabulary."""
    x = random(2, 3, 64, seed=2)
    graph = traced(lambda x: HEADS[name](qg.tensor(x) @ HEAD.T), x)
    for ranks in (3, 8):
        after = agrees(graph, ranks, x)
        (talk,) = [n for n in after.nodes if is_collective(n)]
        assert talk.output.type.size <= 2 * ranks * 6


@pytest.mark.parametrize("ranks", RANKS)
def test_softmax_of_a_split_axis(ranks: int) -> None:
    """The largest and the sum of each row go round, where that is less than the rows."""
    up, down = random(250, 16, seed=3), random(250, 16, seed=4)
    x = random(4000, 16, seed=5)

    def fn(x: Any) -> Any:
        y = qg.shard(qg.tensor(x) @ up.T / 3, 1)
        return qg.softmax(y, axis=-1) @ down, qg.logsumexp(y, axis=-1)

    assert talks(agrees(traced(fn, x), ranks, x))["all_max"]


def test_softmax_where_a_rank_has_nothing_of_it() -> None:
    x, up = random(400, 5, seed=4), random(9, 5, seed=5)
    small = traced(lambda x: qg.softmax(qg.shard(qg.tensor(x) @ up.T, 1), axis=-1), x)
    agrees(small, 8, x)


def test_where_time_counts_a_weight_is_split_only_if_that_is_faster() -> None:
    """A sum of a row takes longer than a small layer, and less than half of a large one."""
    for hidden, count in ((128, 0), (1 << 16, 1)):
        up, down = mx.zeros((hidden, 1024)), mx.zeros((1024, hidden))
        graph = traced(lambda x, a=up, b=down: qg.exp(x @ a.T) @ b.T, mx.zeros((1, 1024)))
        mesh = qg.Mesh(2, goal="time")
        assert talks(Shard(on_mesh(as_target("cpu"), mesh))(graph))["all_sum"] == count


def test_a_row_is_looked_up_whole_where_time_counts() -> None:
    """To split what takes no time saves none: scales of a table once went round for it."""
    table = mx.quantize(random(512, 512, seed=1))

    def fn(tokens: Any) -> Any:
        return qg.exp(qg.dequantize(*(qg.take(part, tokens, axis=0) for part in table)))

    target = on_mesh(as_target("cpu"), qg.Mesh(2, backend="nccl", goal="time"))
    assert not talks(Shard(target)(traced(fn, mx.array([[3]]))))


def test_by_rows_where_that_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums become parts of the rows, which are joined behind what treats rows apart."""
    monkeypatch.setitem(LINKS, "nccl", Link(10e-6, 150e9))
    up, down, norm = random(512, 512, seed=1), random(512, 512, seed=2), random(512, seed=3)

    def block(h: Any) -> Any:
        return h + qg.tanh(qg.fast.rms_norm(h, norm, 1e-5) @ up.T / 9) @ down.T

    cuda = Target(mx.Device(mx.cpu, 0), "cuda", "sm_90", 4, qg.Mesh(2, backend="nccl"))
    for rows, count in ((256, 0), (1 << 13, 2)):
        x = random(rows, 512, seed=4)
        graph = traced(lambda x: block(block(x)), x)
        after = Shard(cuda)(graph)
        assert talks(after)["sum_scatter"] == count
    with mx.stream(mx.cpu):
        (wanted,), (actual,) = (mesh_zoo.run(g, x) for g in (graph, in_one_process(after, 2)))
    assert reference.relative_error(to_numpy(actual), to_numpy(wanted)) < 1e-5


def test_ties_go_to_the_first() -> None:
    same = traced(lambda x: qg.argmax(qg.tensor(x) @ mx.ones((64, 40)), axis=-1), mx.ones((2, 64)))
    agrees(same, 4, mx.ones((2, 64)))


def test_norms_of_split_rows() -> None:
    """Squares are summed over the ranks, one number a row, and the rows stay split."""
    up, down, norm = random(90, 64, seed=1), random(64, 90, seed=2), random(90, seed=3)

    def fn(x: Any) -> Any:
        return qg.fast.rms_norm(qg.exp(x @ up.T / 9), norm, 1e-5) @ down.T

    x = random(2, 64, seed=4)
    for ranks in RANKS:
        assert talks(agrees(traced(lambda x: fn(qg.tensor(x)), x), ranks, x)) == {"all_sum": 2}


def test_statements() -> None:
    """`qg.shard` and `qg.replicate` say where a value lies; on one device they say nothing."""
    x = random(8, 6, seed=1)
    graph = traced(lambda x: qg.replicate(qg.exp(qg.shard(x, 0)) * 2), x)
    after = agrees(graph, 4, x)
    exp = next(n for n in after.nodes if n.op == "exp")
    assert exp.output.shape == (2, 6)
    assert talks(after) == {"all_gather": 1}
    plain = qg.optimize(graph, target="cpu").graph
    assert not {"shard", "replicate"} & {n.op for n in plain.nodes}


@pytest.mark.parametrize("axis", [0, 1])
def test_partial_sums_become_parts_at_once(axis: int) -> None:
    """Over `nccl` by a sum_scatter; `ring` has none, so parts of a whole sum are taken."""
    up, down = random(64, 64, seed=1), random(64, 64, seed=2)
    x = random(4, 8, 64, seed=3)
    fn = lambda x: qg.exp(qg.shard(qg.tanh(qg.tensor(x) @ up) @ down, axis)) * 2  # noqa: E731
    graph = traced(fn, x)
    for backend, name in (("nccl", "sum_scatter"), ("ring", "all_sum")):
        target = on_mesh(as_target("cpu"), qg.Mesh(4, backend=backend))
        after = Shard(target)(graph)
        assert talks(after) == {name: 1, "all_gather": 1}
        (wanted,), (actual,) = (mesh_zoo.run(g, x) for g in (graph, in_one_process(after, 4)))
        assert reference.relative_error(to_numpy(actual), to_numpy(wanted)) < 1e-5


def test_collectives_of_the_users_own_stay() -> None:
    graph = traced(lambda x: qg.distributed.all_sum(x) * 2, mx.ones((4, 4)))
    assert spread(graph, 2) is graph


def test_of_a_weight_that_was_let_go_the_part_that_is_there_is_taken() -> None:
    """Programs of a model share what was packed: a later one does not want another part."""
    up, down = random(64, K, seed=1), random(K, 64, seed=2)
    fn = lambda x: qg.tanh(x @ up.T) @ down.T  # noqa: E731
    for axis in (0, 1):
        graph = traced(fn, random(1, K))
        weight = next(n.output for n in graph.constants() if n.output.shape == (64, K))
        weight.node.args["data"].parts.add((axis, weight.shape[axis] // 2))
        weight.node.args["data"].release()
        parts = [n for n in spread(graph, 2).nodes if n.op == "distributed.part"]
        assert [n.args["axis"] for n in parts if n.inputs[0] is weight] == [axis]


def test_a_mesh_of_one_changes_nothing() -> None:
    x = random(ROWS, K, seed=9)
    graph = traced(mlp("affine-4-32"), x)
    assert spread(graph, 1) is graph


def test_ledger_tells_of_weights_and_collectives() -> None:
    x = random(ROWS, K, seed=9)
    plan = qg.optimize(traced(mlp("affine-4-32"), x), target="cpu", mesh=qg.Mesh(2))
    said = [str(e) for e in plan.ledger() if e.made_by == "shard"]
    talk = next(line for line in said if line.startswith("inserted all_sum"))
    assert "it is partial sums, and add needs it whole" in talk
    assert f"{ROWS * K * 4} bytes, 222 µs expected" in talk
    assert sum(line.startswith("split") for line in said) == 6  # of up, as of gate, and of down


def test_programs_on_a_mesh_in_one_process() -> None:
    """Through all passes; `check` runs the mesh too."""
    x = random(ROWS, K, seed=9)
    graph = traced(mlp("affine-4-32"), x)
    expected = qg.compile(graph, target="cpu", passes=[])(x)
    for ranks in (2, 3):
        program = qg.compile(graph, target="cpu", mesh=qg.Mesh(ranks))
        np.testing.assert_allclose(program(x), expected, rtol=1e-4, atol=1e-4)
        program.plan.check(x)


def test_checks_find_a_wrong_split() -> None:
    """A pass that breaks a rank's graph is named."""

    class Wrong:
        name, contract = "wrong", "tolerance"

        def __call__(self, graph: Graph) -> Graph:
            from qgraph.rewrite.rewriter import rewrite_each

            def visit(node: Any) -> Sequence[Any] | None:
                return [node.operand("x")] if node.op == "distributed.all_sum" else None

            return rewrite_each(graph, visit, "wrong")

    x = random(ROWS, K, seed=9)
    target = on_mesh(as_target("cpu"), qg.Mesh(2))
    plan = qg.optimize(
        traced(mlp("affine-4-32"), x), target=target, passes=[Shard(target), Wrong()]
    )
    with pytest.raises(qg.errors.ContractError, match="the pass wrong"):
        plan.check(x)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), ranks=st.sampled_from(RANKS))
def test_random_graphs(data: st.DataObject, ranks: int) -> None:
    """Products in all spellings, loops and branches; K of 128 makes 3 ranks' parts uneven."""
    formats = list(FORMATS)
    program = data.draw(programs(formats), label="program")
    x, weights = random(ROWS, K, seed=1), parameters(formats)
    graph = qg.trace(lambda w, x: run_program(program, w, x), weights, x, parameters=[0])
    arrays = qg.tree.flatten(((weights, x), {}), static=True)[0]
    agrees(graph, ranks, *arrays, within=1e-4)
