"""Whole programs on a GPU: the model of the examples, products MLX refuses, loops."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.examples import smollm2_files as files
from qgraph.examples.smollm2 import Llama
from tests.support import reference
from tests.support.arrays import to_numpy

GPU = mx.Device(mx.gpu, 0)
pytestmark = pytest.mark.skipif(not mx.is_available(GPU), reason="needs a GPU")


def test_a_model_decodes_as_it_does_as_written() -> None:
    config = files.Config(
        layers=2, hidden=512, ffn=1024, heads=4, kv_heads=2, head_dim=128, vocab=256, rms_eps=1e-5,
        rope_base=1e4, context=128, bos_id=0, eos_id=-1, rope_traditional=False, group_size=64,
    )  # fmt: skip
    weights = {
        name: w.astype(mx.bfloat16) if w.dtype in (mx.float16, mx.float32) else w
        for name, w in files.toy_weights(config).items()
    }
    llama = Llama(config, weights, length=128, dtype=mx.bfloat16)
    state = (mx.array(5), mx.array(0), mx.random.key(0), llama.empty_cache())
    program = qg.compile(llama.decode(6), *state, target="gpu")
    nodes = [n for _, n in program.plan.graph.walk()]
    ops = {n.op for n in nodes}
    assert "tail_attention" in ops  # the token is stored in a tail as it is attended to
    assert not ops & {"slice_update", "fast.rope", "cached_attention"}  # and no cache is copied
    assert len([n for n in nodes if n.op in ("quantized_matmul", "packed_matmul")]) == 2 * 4 + 1
    wide = Llama(config, {n: _wide(w) for n, w in weights.items()}, length=128)
    exact = qg.compile(wide.decode(6), state[0], state[1], state[2], wide.empty_cache(),
                       passes=[], target="cpu")  # fmt: skip
    (*_, cache), tokens = program(*state)
    (*_, caches), expected = exact(*state[:3], wide.empty_cache())
    assert tokens[0].item() == expected[0].item()  # bfloat16 may lead elsewhere later
    keys, wanted = to_numpy(cache[0][0])[:, :, :1], to_numpy(caches[0][0])[:, :, :1]
    assert reference.relative_error(keys, wanted) < 2e-2


def _wide(w: mx.array) -> mx.array:
    return w.astype(mx.float32) if w.dtype == mx.bfloat16 else w


def test_packed_weights_that_do_not_lie_row_by_row() -> None:
    """MLX on CUDA: No implementation."""
    parts = mx.quantize(mx.random.normal((4, 64, 512), key=mx.random.key(0)).astype(mx.bfloat16))
    x = mx.random.normal((3, 512), key=mx.random.key(1)).astype(mx.bfloat16)

    def fn(x: Any) -> Any:
        swapped = [qg.swapaxes(qg.tensor(p), 0, 1)[:, 1] for p in parts]
        return qg.quantized_matmul(x, *swapped)

    y = qg.compile(fn, x, target="gpu")(x)
    dense = reference.dequantize(*[to_numpy(p) for p in parts], 64, 4, "affine")[1]
    exact = to_numpy(x).astype(np.float64) @ dense.T
    assert reference.relative_error(to_numpy(y), exact) < 2e-2


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_weights_whose_rows_are_one_group(dtype: mx.Dtype) -> None:
    """MLX on Hopper GPUs: writes nothing."""
    parts = mx.quantize(mx.random.normal((96, 64), key=mx.random.key(0)).astype(dtype))
    x = mx.random.normal((17, 64), key=mx.random.key(1)).astype(dtype)
    y = qg.compile(lambda x: qg.quantized_matmul(x, *parts), x, target="gpu")(x)
    dense = reference.dequantize(*[to_numpy(p) for p in parts], 64, 4, "affine")
    exact = to_numpy(x).astype(np.float64) @ dense.T
    assert reference.relative_error(to_numpy(y), exact) < 2e-2


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_quantizing_in_a_loop_is_hoisted(mode: str) -> None:
    w = mx.random.normal((256, 256), key=mx.random.key(0)).astype(mx.bfloat16) / 16
    x = mx.random.normal((1, 256), key=mx.random.key(1)).astype(mx.bfloat16)
    group, bits = {"affine": (64, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}.get(mode, (32, 4))

    def fn(x: Any) -> Any:
        body = lambda i, h: qg.tanh(  # noqa: E731
            qg.quantized_matmul(h, w, mode=mode, group_size=group, bits=bits)
        )
        return qg.fori_loop(0, 4, body, x)

    program = qg.compile(fn, x, target="gpu")
    assert [n.stage for _, n in program.plan.graph.walk() if n.op == "quantize"] == ["pack"]
    with mx.stream(mx.cpu):
        parts = mx.quantize(w, mode=mode, group_size=group, bits=bits)
    dense = reference.dequantize(
        *[to_numpy(p) for p in parts], group_size=group, bits=bits, mode=mode
    )
    h = to_numpy(x).astype(np.float64)
    for _ in range(4):
        h = np.tanh(h @ dense.T)
    assert reference.relative_error(to_numpy(program(x)), h) < 8e-2  # four products in bfloat16
