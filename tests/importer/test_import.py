"""`from_mlx` and `call`: what is imported gives, bit for bit, what the function gives."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg
from qgraph.analysis.verify import verify
from qgraph.errors import UnsupportedError
from tests.support.arrays import one_buffer
from tests.support.fusion import not_compiled

KEY = mx.random.key(0)
X = mx.random.normal((4, 6), key=KEY)
CUBE = mx.random.normal((3, 4, 6), key=KEY)
INTS = mx.array([[3, 1, 2], [7, 5, 9]])
W = mx.random.normal((128, 64), key=KEY)
Q = mx.quantize(W)
SPD = mx.array([[4.0, 1.0], [1.0, 3.0]])


def agree(fn: Any, *args: Any, **keywords: Any) -> qg.Graph:
    """The imported graph replays exactly on the arguments and on others; returns it."""
    graph = qg.from_mlx(fn, *args, **keywords)
    verify(graph)
    with not_compiled():
        program = qg.compile(graph, passes=[], target="cpu")
    for again in (args, qg.tree.tree_map(_other, args)):
        expected = qg.tree.flatten(fn(*again, **keywords))[0]
        with not_compiled():
            actual = qg.tree.flatten(program(*again, **keywords))[0]
            mx.eval(actual)
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == b.dtype
            assert mx.array_equal(a, b, equal_nan=True)
    return graph


def _other(leaf: Any) -> Any:
    return leaf * 2 if isinstance(leaf, mx.array) and leaf.dtype == mx.float32 else leaf


def _updated(x: mx.array) -> mx.array:
    y = mx.array(x)
    y[1:3, ::2] = 7.0
    y[0] += 1
    y[mx.array([1, 3]), mx.array([0, 2])] = -1.0
    return y


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "arithmetic": (lambda x, y: (x + y) * 2 - x / y + x // y + x % y, (X, X + 3)),
    "unary": (
        lambda x: mx.exp(x) + mx.sin(x) + mx.erf(x) + mx.abs(x) + mx.rsqrt(mx.square(x)),
        (X,),
    ),
    "logs": (lambda x: mx.log(x) + mx.log2(x) + mx.log10(x) + mx.log1p(x), (mx.abs(X),)),
    "logic": (lambda x: mx.where((x > 0) & (x < 1) | mx.isnan(x), x, ~(x > 0)), (X,)),
    "bits": (lambda a: (a & 3) | (a << 1) ^ (a >> 1), (INTS,)),
    "invert": (lambda a: ~a, (INTS,)),
    "divmod": (lambda a: mx.divmod(a, 2), (INTS,)),
    "reductions": (
        lambda x: [x.sum(0), x.mean(1), x.max(), x.prod(1), mx.var(x, 0), mx.any(x > 1)],
        (X,),
    ),
    "arguments": (
        lambda x: [mx.argmax(x, 1), mx.argmin(x), mx.argsort(x, 0), mx.argpartition(x, 2)],
        (X,),
    ),
    "sorting": (lambda x: [mx.sort(x), mx.partition(x, 2), mx.topk(x, 2)], (X,)),
    "scans": (
        lambda x: [
            mx.cumsum(x, 0),
            mx.cumprod(x, 1, reverse=True),
            mx.cummax(x, 0, inclusive=False),
        ],
        (X,),
    ),
    "softmax": (lambda x: [mx.softmax(x, -1), mx.softmax(x, 0), mx.logsumexp(x, -1)], (X,)),
    "precise": (lambda x: mx.softmax(x, -1, precise=True), (X.astype(mx.float16),)),
    "shapes": (lambda x: x.reshape(2, 12).T.flatten()[None].squeeze(0).reshape(3, -1), (X,)),
    "unflatten": (lambda x: mx.unflatten(x, 1, (2, 3)).transpose(2, 0, 1), (X,)),
    "joining": (
        lambda x: [mx.concatenate([x, x], 1), mx.stack([x, x]), *mx.split(x, [1, 3], 1)],
        (X,),
    ),
    "pad": (lambda x: mx.pad(x, [(1, 2), (0, 3)], constant_values=1.5), (X,)),
    "tile": (lambda x: mx.repeat(mx.tile(x, (2, 1)), 2, 0), (X,)),
    "slices": (lambda x: [x[1:3], x[::-1], x[:, ::-2], x[..., -1:], x[3:0:-1]], (X,)),
    "indexing": (
        lambda x: [
            x[mx.array([1, 3])],
            x[:, mx.array([0, 2])],
            x[mx.array([[1], [2]]), mx.array([0, 5])],
        ],
        (X,),
    ),
    "cube indexing": (
        lambda x: [
            x[:, mx.array([2, 0])],
            x[mx.array([0, 2]), :, mx.array([1, 5])],
            mx.take(x, mx.array([1, 0]), 1),
        ],
        (CUBE,),
    ),
    "take along": (lambda x: mx.take_along_axis(x, mx.array([[1], [0], [2], [3]]), 1), (X,)),
    "put along": (
        lambda x: mx.put_along_axis(x, mx.array([[1], [0], [2], [3]]), mx.array(9.0), 1),
        (X,),
    ),
    "update": (_updated, (X,)),
    "at": (
        lambda x: [
            x.at[mx.array([0, 2])].add(1.0),
            x.at[:, mx.array([1, 1])].maximum(0.5),
            x.at[1:2].multiply(3.0),
        ],
        (X,),
    ),
    "dynamic slices": (
        lambda x, s: [mx.slice(x, s, [0], [2, 6]), mx.slice_update(x, x[:1], s, [0])],
        (X, mx.array([1])),
    ),
    "products": (
        lambda x: [
            x @ x.T,
            mx.addmm(x, x @ x.T, x, 0.5, 2.0),
            mx.einsum("ij,kj->ki", x, x),
            mx.tensordot(x, x.T, 1),
        ],
        (X,),
    ),
    "gather_mm": (
        lambda x: mx.gather_mm(
            x, x.swapaxes(1, 2), rhs_indices=mx.array([0, 0, 2], mx.uint32), sorted_indices=True
        ),
        (CUBE,),
    ),
    "quantized": (
        lambda x: [mx.quantized_matmul(x, *Q), x @ mx.dequantize(*Q).T],
        (mx.ones((2, 64)),),
    ),
    "quantize": (lambda w: mx.quantize(w, 32, 8), (W,)),
    "gather_qmm": (
        lambda x: mx.gather_qmm(
            x, *mx.quantize(W.reshape(2, 64, 64)), rhs_indices=mx.array([1], mx.uint32)
        ),
        (mx.ones((1, 2, 64)),),
    ),
    "convolutions": (
        lambda x, w: [mx.conv1d(x, w, 2, 1), mx.conv_transpose1d(x, w)],
        (CUBE, mx.random.normal((5, 3, 6), key=KEY)),
    ),
    "fft": (
        lambda x: [mx.fft.fft(x).real, mx.fft.irfft(mx.fft.rfft(x)), mx.fft.ifft2(x).imag],
        (CUBE,),
    ),
    "casts": (lambda x: [x.astype(mx.int32), x.astype(mx.bfloat16) + 1, x.view(mx.uint32)], (X,)),
    "arange": (lambda x: x + mx.arange(6) + mx.arange(0.0, 3.0, 0.5), (X,)),
    "creation": (
        lambda x: x + mx.ones((4, 6)) + mx.full((6,), 2.5) + mx.eye(4, 6) + mx.tri(4, 6),
        (X,),
    ),
    "hadamard": (lambda x: mx.hadamard_transform(x), (mx.ones((2, 64)),)),
    "search": (lambda x: mx.searchsorted(mx.sort(x[0]), x[1]), (X,)),
    "cholesky": (lambda a: mx.linalg.cholesky(a), (SPD,)),
    "strided": (lambda x: mx.as_strided(x, (3, 2), (2, 1), 1), (X,)),
    "contiguous": (lambda x: mx.contiguous(x.T) + 1, (X,)),
    "random": (lambda k: mx.random.uniform(shape=(4,), key=k), (KEY,)),
    "norms": (
        lambda x: [mx.fast.rms_norm(x, x[0], 1e-5), mx.fast.layer_norm(x, None, None, 1e-5)],
        (X,),
    ),
    "rope": (
        lambda x: mx.fast.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=3),
        (mx.random.normal((1, 2, 3, 8), key=KEY),),
    ),
    "attention": (
        lambda x: mx.fast.scaled_dot_product_attention(x, x, x, scale=0.3, mask="causal"),
        (mx.random.normal((1, 2, 3, 8), key=KEY),),
    ),
    "compiled": (lambda x: mx.compile(lambda a: mx.tanh(a) * 2)(x), (X,)),
    "scalars": (lambda x: (x.sum(), x[0, 0] * 2), (X,)),
    "identity": (lambda x: (x, x), (X,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_replay_exactly(name: str) -> None:
    fn, args = FUNCTIONS[name]
    agree(fn, *args)


def test_trees_and_keywords() -> None:
    def fn(batch: Any, *, scale: Any, times: int) -> Any:
        return {"y": batch["x"] * scale * times, "rest": [batch["z"][0], None]}

    batch = {"x": X, "z": (X + 1,)}
    graph = qg.from_mlx(fn, batch, scale=mx.array(2.0), times=3)
    assert [v.node.args["name"] for v in graph.inputs] == ["batch.x", "batch.z.0", "scale"]
    result = qg.compile(graph)(batch, scale=mx.array(2.0), times=3)
    assert mx.array_equal(result["y"], X * 6)
    assert result["rest"][1] is None


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.GELU(), nn.RMSNorm(64),
                         nn.MultiHeadAttention(64, 4), nn.Linear(64, 5, bias=False))  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.attention = nn.MultiHeadAttention(64, 4)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 5)

    def __call__(self, ids: mx.array) -> Any:
        h = self.embed(ids)
        h = h + self.attention(h, h, h)
        return self.head(nn.gelu(self.norm(h)))


def test_modules_keep_names_and_are_left_as_they_are() -> None:
    block = Block()
    weights = dict(nn.utils.tree_flatten(block.parameters()))
    ids = mx.array([[1, 2, 3]])
    graph = agree(block, ids)
    named = {n.args["name"]: n for n in graph.constants() if n.args["name"]}
    assert set(weights) <= set(named)
    assert all(one_buffer(named[path].args["data"].array, a) for path, a in weights.items())
    after = dict(nn.utils.tree_flatten(block.parameters()))
    assert all(after[path] is array for path, array in weights.items())


def test_quantized_modules_and_the_passes() -> None:
    block = Block()
    nn.quantize(block, group_size=32, bits=4)
    ids = mx.array([[1, 2, 3]])
    graph = agree(block, ids)
    plan = qg.optimize(graph, target="cpu")
    assert plan.graph.count() < graph.count()
    assert mx.allclose(qg.compile(graph, target="cpu")(ids), block(ids), atol=1e-5)


def test_a_module_as_the_body_of_a_loop() -> None:
    layer = nn.Linear(6, 6)

    def fn(x: Any) -> Any:
        return qg.fori_loop(0, 3, lambda i, h: qg.tanh(qg.call(layer, h)), x)

    expected = X
    for _ in range(3):
        expected = mx.tanh(layer(expected))
    graph = qg.trace(fn, X)
    assert {n.args["name"] for n in graph.constants()} >= {"weight", "bias"}
    assert mx.allclose(qg.compile(graph, target="cpu")(X), expected, atol=1e-6)


def test_random_state_is_left_as_it_was() -> None:
    mx.random.seed(11)
    expected = mx.random.normal((3,))
    mx.random.seed(11)
    with pytest.warns(UserWarning, match="without a key"):
        qg.from_mlx(lambda x: x + mx.random.normal((2,)), mx.ones(2))
    assert mx.array_equal(mx.random.normal((3,)), expected)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x: x if x.sum().item() > 0 else -x, "evaluates an array"),
    ],
)
def test_what_cannot_be_had_is_named(fn: Any, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        qg.from_mlx(fn, SPD)
    assert "test_import.py" in str(caught.value)
    assert mx.contiguous.__module__ == "mlx.core"


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
         "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
         "vocab_size": 100, "rope_theta": 1e4, "tie_word_embeddings": True,
         "head_dim": 16, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "phi3",
        "olmo2",
        "mixtral",
        "granite",
        "starcoder2",
    ],
)
def test_models_of_mlx_lm(name: str) -> None:
    pytest.importorskip("mlx_lm")
    module = importlib.import_module(f"mlx_lm.models.{name}")
    extra: dict[str, Any] = {
        "gemma2": {"query_pre_attn_scalar": 16},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "granite": {"logits_scaling": 1.0, "attention_multiplier": 0.25,
                    "embedding_multiplier": 1.0,
                    "residual_multiplier": 1.0, "attention_bias": False, "mlp_bias": False},
        "starcoder2": {"norm_epsilon": 1e-5},
    }.get(name, {})  # fmt: skip
    args = module.ModelArgs.from_dict({"model_type": name, **SIZES, **extra})
    lm = module.Model(args)
    lm.eval()
    mx.eval(lm.parameters())
    ids = mx.array([[1, 7, 3, 99, 4]])
    graph = agree(lm, ids)
    optimized = qg.compile(graph, target="cpu")
    for tokens in (ids, ids[:, ::-1] + 0):
        expected = lm(tokens)
        error = mx.abs(optimized(tokens) - expected).max() / mx.abs(expected).max()
        assert error.item() < 1e-4
