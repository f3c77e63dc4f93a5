"""Every primitive that MLX serializes is one that the importer knows, or refuses in words."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.errors import UnsupportedError
from qgraph.importer.patches import Markers
from qgraph.importer.primitives import PRIMITIVES
from qgraph.importer.record import Recording, record
from qgraph.importer.replay import replay
from qgraph.ir import Graph, input_value
from qgraph.tensor import Tensor
from qgraph.trace import in_program_order, tracing
from qgraph.tree import LEAF, flatten
from qgraph.types import type_of
from tests.test_import import CUBE, FUNCTIONS, INTS, KEY, SPD, X, agree

NAMES = """
    Abs Add AddMM Arange ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTan2 ArcTanh ArgPartition
    ArgReduce ArgSort AsStrided AsType BitwiseBinary BlockMaskedMM Broadcast BroadcastAxes Ceil
    Cholesky Concatenate Conjugate Convolution Copy Cos Cosh Depends DivMod Divide DynamicSlice
    DynamicSliceUpdate Eig Eigh Equal Erf ErfInv Exp ExpandDims Expm1 FFT Flatten Floor
    FloorDivide Full Gather GatherAxis GatherMM GatherQMM Greater GreaterEqual Hadamard Imag
    Inverse Less LessEqual Log Log1p LogAddExp LogSumExp LogicalAnd LogicalNot LogicalOr
    MaskedScatter Matmul Maximum Minimum Multiply Negative NotEqual NumberOfElements Pad
    Partition Power QRF QuantizedMatmul RandomBits Real Reduce Remainder Reshape Round SVD Scan
    Scatter ScatterAxis SearchSorted Select Sigmoid Sign Sin Sinh Slice SliceUpdate Softmax Sort
    Split Sqrt Square Squeeze StopGradient Subtract Tan Tanh Transpose Unflatten View
    CustomKernel LayerNorm LayerNormVJP Quantize RMSNorm RMSNormVJP RoPE
    ScaledDotProductAttention
"""
SERIALIZABLE = sorted(NAMES.split())
"""What MLX 0.32.4 serializes: `nm -C libmlx.so | grep primitive_state`."""


def test_the_list_is_that_of_the_installed_mlx() -> None:
    library = Path(mx.__file__).parent / "lib" / "libmlx.so"
    if shutil.which("nm") is None or not library.exists():
        pytest.skip("needs nm and MLX as a shared library with symbols")
    symbols = subprocess.run(["nm", "-C", library], capture_output=True, text=True).stdout
    found = {
        line.split("primitive_state<")[1].split(">")[0].rsplit("::", 1)[-1]
        for line in symbols.splitlines()
        if "primitive_state<" in line
    }
    if not found:
        pytest.skip("MLX was built without symbols")
    assert found == set(SERIALIZABLE)


def graph_of(name: str, arguments: Sequence[Any], arrays: Sequence[mx.array],
             outputs: Sequence[mx.array]) -> Graph:  # fmt: skip
    """What comes of one primitive handed over with this state, for results like `outputs`."""
    keys = [f"I{k}" for k in range(len(arrays))]
    made = [f"O{k}" for k in range(len(outputs))]
    primitive = {
        "type": "primitive",
        "name": name,
        "arguments": list(arguments),
        "inputs": [(k, a.shape, a.dtype) for k, a in zip(keys, arrays, strict=True)],
        "outputs": [(k, a.shape, a.dtype) for k, a in zip(made, outputs, strict=True)],
    }
    recording = Recording({}, keys, {}, [primitive], made, {}, {}, LEAF, Markers())
    inputs = [input_value(type_of(a), key) for a, key in zip(arrays, keys, strict=True)]
    with tracing():
        tensors = replay(recording, [Tensor(v) for v in inputs], "f")
    values = [t.value for t in tensors]
    tree = flatten((tuple(arrays), {}))[1]
    return Graph("f", inputs, in_program_order(values, inputs), values, in_tree=tree,
                 out_tree=flatten(tuple(values))[1])  # fmt: skip


def by_hand(name: str, arguments: Sequence[Any], arrays: Sequence[mx.array], expected: Any,
            *, tolerance: float = 0.0) -> Graph:  # fmt: skip
    """The primitive gives what is expected."""
    wanted = list(expected) if isinstance(expected, list | tuple) else [expected]
    graph = graph_of(name, arguments, arrays, wanted)
    actual = qg.compile(graph, passes=[], target="cpu")(*arrays)
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == want.dtype
        a, b = (np.array(t.astype(mx.float32)) for t in (got, want))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    return graph


HEADS = mx.random.normal((2, 4, 6, 16), key=KEY)
KEYS = mx.random.normal((2, 2, 6, 16), key=mx.random.key(1))
VALUES = mx.random.normal((2, 2, 6, 16), key=mx.random.key(2))
ROWS = mx.random.normal((3, 5, 64), key=mx.random.key(3))
SCALE = mx.random.uniform(0.5, 1.5, (64,), key=mx.random.key(4))
SHIFT = mx.random.normal((64,), key=mx.random.key(5))
ONE = mx.array(1.0)
WEIGHT = mx.random.normal((2, 64, 64), key=mx.random.key(6))
MODES = {"affine": (64, 4, 0), "mxfp4": (32, 4, 1), "mxfp8": (32, 8, 2), "nvfp4": (16, 4, 3)}


def test_norms() -> None:
    rms, layer = mx.fast.rms_norm, mx.fast.layer_norm
    assert by_hand("RMSNorm", [1e-5], [ROWS, SCALE], rms(ROWS, SCALE, 1e-5)).count() == 1
    by_hand("RMSNorm", [1e-5], [ROWS, ONE], rms(ROWS, None, 1e-5))
    by_hand("LayerNorm", [1e-5], [ROWS, SCALE, SHIFT], layer(ROWS, SCALE, SHIFT, 1e-5))
    by_hand("LayerNorm", [1e-5], [ROWS, SCALE, ONE], layer(ROWS, SCALE, None, 1e-5))
    by_hand("LayerNorm", [1e-5], [ROWS, ONE, ONE], layer(ROWS, None, None, 1e-5))


def test_gradients_of_norms() -> None:
    g = mx.random.normal(ROWS.shape, key=mx.random.key(7))
    _, expected = mx.vjp(lambda x, w: mx.fast.rms_norm(x, w, 1e-5), [ROWS, SCALE], [g])
    by_hand("RMSNormVJP", [1e-5], [ROWS, SCALE, g], expected, tolerance=1e-4)
    _, (dx,) = mx.vjp(lambda x: mx.fast.rms_norm(x, None, 1e-5), [ROWS], [g])
    by_hand("RMSNormVJP", [1e-5], [ROWS, ONE, g], [dx, mx.array(0.0)], tolerance=1e-4)
    _, expected = mx.vjp(
        lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5), [ROWS, SCALE, SHIFT], [g]
    )
    by_hand("LayerNormVJP", [1e-5], [ROWS, SCALE, SHIFT, g], expected, tolerance=1e-4)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [8, 16])
def test_rope(dims: int, traditional: bool) -> None:
    def turned(x: mx.array, offset: Any = 3, freqs: Any = None) -> mx.array:
        base = None if freqs is not None else 1e4
        return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=0.5,
                            offset=offset, freqs=freqs)  # fmt: skip

    state = [dims, traditional, 1e4, 0.5, True]
    offsets = mx.array([3, 5], mx.int32)
    freqs = mx.arange(1, dims // 2 + 1).astype(mx.float32)
    by_hand("RoPE", state, [HEADS, mx.array(3)], turned(HEADS))
    by_hand("RoPE", state, [HEADS, offsets], turned(HEADS, offsets))
    by_hand("RoPE", state, [HEADS, mx.array(3), freqs], turned(HEADS, 3, freqs))
    _, (gradient,) = mx.vjp(turned, [HEADS], [HEADS])
    by_hand("RoPE", [*state[:4], False], [HEADS, mx.array(3)], gradient, tolerance=1e-6)


def test_attention() -> None:
    def attend(**keywords: Any) -> mx.array:
        return mx.fast.scaled_dot_product_attention(HEADS, KEYS, VALUES, scale=0.25, **keywords)

    name, qkv = "ScaledDotProductAttention", [HEADS, KEYS, VALUES]
    allowed = mx.random.bernoulli(0.7, (2, 4, 6, 6), key=KEY)
    added = mx.random.normal((2, 4, 6, 6), key=KEY)
    sinks = mx.array([0.5, -1.0, 2.0, 0.0])
    by_hand(name, [0.25, False, False, False, False], qkv, attend())
    by_hand(name, [0.25, True, False, False, False], qkv, attend(mask="causal"))
    by_hand(name, [0.25, False, False, False, False], [*qkv, allowed], attend(mask=allowed))
    by_hand(name, [0.25, False, False, False, False], [*qkv, added], attend(mask=added))
    by_hand(name, [0.25, True, True, False, False], [*qkv, sinks],
            attend(mask="causal", sinks=sinks))  # fmt: skip
    by_hand(name, [0.25, False, True, False, False], [*qkv, added, sinks],
            attend(mask=added, sinks=sinks))  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"f uses .*ScaledDotProductAttention.*gradient"):
        graph_of(name, [0.25, False, False, True, False], qkv, [attend(), HEADS[..., 0]])


@pytest.mark.parametrize("mode", MODES)
def test_quantized(mode: str) -> None:
    group, bits, number = MODES[mode]
    settings: dict[str, Any] = {"group_size": group, "bits": bits, "mode": mode}
    w = WEIGHT[0]
    parts = mx.quantize(w, **settings)
    state = [group, bits, number]
    by_hand("Quantize", [*state, False], [w], parts)
    dense = mx.dequantize(*parts, **settings)
    by_hand("Quantize", [*state, True], parts, dense)
    half = mx.dequantize(*parts, **settings, dtype=mx.float16)
    by_hand("Quantize", [*state, True], parts, half, tolerance=1e-3)
    x = ROWS[0]
    by_hand("QuantizedMatmul", [*state, True], [x, *parts],
            mx.quantized_matmul(x, *parts, **settings))  # fmt: skip
    if mode == "affine":
        by_hand("QuantizedMatmul", [*state, False], [x, *parts],
                mx.quantized_matmul(x, *parts, transpose=False, **settings))  # fmt: skip
    experts = mx.quantize(WEIGHT, **settings)
    rows = ROWS[:, :1]
    left, right = mx.array([0, 2, 1], mx.uint32), mx.array([0, 1, 1], mx.uint32)
    for flags, indices in (
        ((False, False), {"lhs_indices": left, "rhs_indices": right}),
        ((False, True), {"rhs_indices": right, "sorted_indices": True}),
    ):
        given = left if flags == (False, False) else mx.arange(3, dtype=mx.uint32)
        expected = mx.gather_qmm(rows, *experts, **indices, **settings)
        by_hand("GatherQMM", [*state, True, *flags], [rows, *experts, given, right], expected)


def test_the_global_scale_of_nvfp4() -> None:
    w, number = WEIGHT[0], mx.array(4.0)
    parts = mx.quantize(w, mode="nvfp4")
    for arguments, arrays, name in (
        ([16, 4, 3, False], [w, number], "quantize"),
        ([16, 4, 3, True], [*parts, number], "dequantize"),
    ):
        results = parts if name == "quantize" else [w]
        graph = graph_of("Quantize", arguments, arrays, results)
        assert graph.nodes[-1].op == name
        assert graph.nodes[-1].args["global_scale"] is graph.inputs[-1]


def test_what_no_function_of_mlx_makes() -> None:
    by_hand("Copy", [], [X], X)
    by_hand("StopGradient", [], [X], X)
    by_hand("NumberOfElements", [[0, 1], False, mx.int32], [X], mx.array(24))
    by_hand("NumberOfElements", [[1], True, mx.float32], [X], mx.array(1 / 6))
    by_hand("BroadcastAxes", [[-1]], [X[:1], X], mx.broadcast_to(X[:1], (4, 6)))
    by_hand("Reshape", [[4, -1]], [X], X)


def _assigned(x: mx.array, value: Any) -> mx.array:
    y = mx.array(x)
    y[x > 0] = value
    return y


def _checkpointed(x: mx.array) -> mx.array:
    @mx.custom_function
    def double(a: mx.array) -> mx.array:
        return a * 2

    @double.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return cotangents

    return mx.checkpoint(mx.tanh)(double(x))


MATRIX = mx.random.normal((4, 4), key=KEY)
MASK = mx.array([[True, False], [False, True]])
WIDE = mx.random.normal((64, 64), key=KEY)
SQUARE = mx.random.normal((32, 64), key=KEY)
EIGHT = mx.random.split(KEY, 8)
MORE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "trigonometry": (
        lambda x: [getattr(mx, name)(x / 8) for name in (
            "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctanh", "cos", "cosh", "sinh",
            "tan", "tanh", "expm1", "erfinv", "floor", "ceil", "sign", "sigmoid", "round",
            "negative", "logical_not")], (X,)),
    "pairs": (
        lambda x, y: [getattr(mx, name)(x, y) for name in (
            "arctan2", "logaddexp", "minimum", "maximum", "power", "floor_divide", "greater_equal",
            "less", "less_equal", "not_equal", "equal")], (X, X.T.reshape(4, 6))),
    "complex": (lambda x: mx.conjugate(mx.fft.fft(x)).real, (X,)),
    "odd inverse": (lambda x: mx.fft.irfftn(mx.fft.rfftn(x), s=[4, 5], axes=[0, 1]), (X,)),
    "array equal": (lambda x: mx.array_equal(x, x * 1, equal_nan=True), (X,)),
    "masked product": (
        lambda a, b: [mx.block_masked_mm(a, b, 32, mask_out=MASK),
                      mx.block_masked_mm(a, b, 32, mask_lhs=MASK, mask_rhs=~MASK),
                      mx.block_masked_mm(a, b, 32, MASK, MASK, MASK)], (WIDE, WIDE + 1)),
    "masked assignment": (lambda x: [_assigned(x, 7.0), _assigned(x, mx.arange(24.0))], (X,)),
    "masked rows": (lambda x: _assigned(x, mx.arange(24.0)), (CUBE[0] - 1,)),
    "depends": (lambda x: mx.depends([x * 2, x + 1], [mx.exp(x)]), (X,)),
    "dynamic": (lambda x, s: mx.slice_update(x, mx.slice(x, s, [0, 1], [2, 3]), s + 1, [0, 1]),
                (X, mx.array([1, 2]))),
    "negative steps": (lambda x: [x[::-2, ::-1], x.at[::-1, 4:0:-2].add(1.0)], (X,)),
    "scattered sums": (
        lambda x: mx.grad(lambda a: (mx.take_along_axis(a, INTS % 3, 1) ** 2).sum())(x),
        (MATRIX[:2],)),
    "two axes": (
        lambda x: mx.vmap(lambda row, i: row[i], in_axes=(1, 0))(x, mx.array([1, 0, 3, 2, 1, 0])),
        (X,)),
    "sorted experts": (
        lambda x: mx.gather_mm(x, CUBE.swapaxes(1, 2), lhs_indices=mx.array([0, 1, 1], mx.uint32),
                               sorted_indices=True), (CUBE,)),
    "split keys": (lambda k: mx.random.split(k, 3), (KEY,)),
    "odd bits": (lambda k: [mx.random.uniform(shape=shape, key=k) for shape in (
        (1,), (3,), (5, 7), ())], (KEY,)),
    "half bits": (lambda k: [mx.random.uniform(shape=(n,), dtype=dtype, key=k)
                             for n in (1, 2, 3, 6) for dtype in (mx.float16, mx.bfloat16)], (KEY,)),
    "bits for keys": (
        lambda keys: [mx.vmap(lambda k, n=n: mx.random.uniform(shape=(n,), key=k))(keys)
                      for n in (1, 4, 5)], (EIGHT,)),
    "distributions": (
        lambda k: [mx.random.normal((3, 3), key=k), mx.random.bernoulli(0.3, (5,), key=k),
                   mx.random.randint(0, 9, (7,), key=k), mx.random.gumbel((2, 3), key=k),
                   mx.random.permutation(5, key=k), mx.random.categorical(X, key=k),
                   mx.random.truncated_normal(-1.0, 1.0, (3,), key=k),
                   mx.random.laplace((3,), key=k)],
        (KEY,)),
    "factors": (lambda a: [*mx.linalg.qr(a, stream=mx.cpu), *mx.linalg.svd(a, stream=mx.cpu),
                           mx.linalg.svd(a, False, stream=mx.cpu)], (X,)),
    "inverses": (lambda a: [mx.linalg.inv(a, stream=mx.cpu), mx.linalg.pinv(a, stream=mx.cpu),
                            mx.linalg.tri_inv(mx.tril(a), stream=mx.cpu),
                            mx.linalg.tri_inv(mx.triu(a), True, stream=mx.cpu),
                            mx.linalg.cholesky(a @ a.T, True, stream=mx.cpu)], (MATRIX,)),
    "eigenvalues": (lambda a: [*mx.linalg.eigh(a, stream=mx.cpu),
                               mx.linalg.eigvalsh(a, "U", stream=mx.cpu),
                               *mx.linalg.eig(a, stream=mx.cpu),
                               mx.linalg.eigvals(a, stream=mx.cpu)], (SPD,)),
    "lu": (lambda a: [*mx.linalg.lu(a, stream=mx.cpu), *mx.linalg.lu_factor(a, stream=mx.cpu)],
           (MATRIX,)),
    "solve": (lambda a, b: [mx.linalg.solve(a, b, stream=mx.cpu),
                            mx.linalg.solve_triangular(a, b, upper=True, stream=mx.cpu),
                            mx.linalg.det(a, stream=mx.cpu),
                            *mx.linalg.slogdet(a, stream=mx.cpu)], (MATRIX, X)),
    "scanned": (lambda x: [mx.logcumsumexp(x, 1), x.logcumsumexp(axis=0, reverse=True),
                           mx.cummin(x, 1)], (X,)),
    "segments": (lambda a, b: mx.segmented_mm(a, b, mx.array([[0, 2], [2, 6]], mx.uint32)),
                 (X, X.T)),
    "fp8": (lambda x: mx.from_fp8(mx.to_fp8(x), dtype=mx.float32), (X,)),
    "other modes": (
        lambda w: [part for mode in MODES for part in (
            *mx.quantize(w, mode=mode),
            mx.dequantize(*mx.quantize(w, mode=mode), mode=mode, dtype=mx.float32))], (SQUARE,)),
    "undecorated": (_checkpointed, (X,)),
    "inverted": (lambda a: [~a, mx.bitwise_invert(a)], (INTS,)),
    "unequal": (lambda x: [mx.isclose(x, x), mx.logical_or(x > 0, x < 1)], (X,)),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_functions_replay_exactly(name: str) -> None:
    fn, args = MORE[name]
    agree(fn, *args)


def test_every_primitive_is_tested() -> None:
    """By a function that MLX turns into it, or by hand above."""
    seen: set[str] = set()
    for fn, args in (*FUNCTIONS.values(), *MORE.values()):
        arrays, tree = flatten((args, {}), static=True)
        seen |= {p["name"] for p in record(fn, arrays, tree).primitives}
    hand = {"RMSNorm", "RMSNormVJP", "LayerNorm", "LayerNormVJP", "RoPE", "Quantize",
            "ScaledDotProductAttention", "Copy", "StopGradient", "NumberOfElements",
            "BroadcastAxes"}  # fmt: skip
    assert set(PRIMITIVES) - seen - hand == set()


@pytest.mark.parametrize("name", SERIALIZABLE)
def test_each_is_known_or_refused(name: str) -> None:
    if name in PRIMITIVES:
        return
    with pytest.raises(UnsupportedError) as caught:
        graph_of(name, ["own_kernel"], [X], [X])
    assert "from_mlx: f uses" in str(caught.value)
    assert name in str(caught.value)
    assert len(caught.value.hint) > 20


def test_refused_are_few() -> None:
    assert set(SERIALIZABLE) - set(PRIMITIVES) == {"CustomKernel"}
