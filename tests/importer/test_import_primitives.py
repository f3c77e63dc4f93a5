"""Every primitive that MLX serializes is one that the importer knows, or refuses in words."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.errors import UnsupportedError
from qgraph.importer.capture import Capture, capture
from qgraph.importer.markers import Markers
from qgraph.importer.primitives import PRIMITIVES
from qgraph.importer.replay import replay
from qgraph.ir import Graph, input_value
from qgraph.tracing.tensor import Tensor
from qgraph.tracing.trace import in_program_order, tracing
from qgraph.tree import LEAF, flatten
from qgraph.types import type_of
from tests.importer.test_import import FUNCTIONS, KEY, X, agree
from tests.support.import_cases import MORE

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
    captured = Capture({}, keys, {}, [primitive], made, {}, {}, LEAF, Markers())
    inputs = [input_value(type_of(a), key) for a, key in zip(arrays, keys, strict=True)]
    with tracing():
        tensors = replay(captured, [Tensor(v) for v in inputs], "f")
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


@pytest.mark.parametrize("name", MORE)
def test_functions_replay_exactly(name: str) -> None:
    fn, args = MORE[name]
    agree(fn, *args)


def test_every_primitive_is_tested() -> None:
    """By a function that MLX turns into it, or by hand above."""
    seen: set[str] = set()
    for fn, args in (*FUNCTIONS.values(), *MORE.values()):
        arrays, tree = flatten((args, {}), static=True)
        seen |= {p["name"] for p in capture(fn, arrays, tree).primitives}
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
