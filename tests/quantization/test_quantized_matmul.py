"""The contract of `quantized_matmul`: both documented examples, every mode, every misuse."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.errors import QuantizationError
from qgraph.quantization.modes import MODES
from tests.support import reference
from tests.support.arrays import to_numpy

X = mx.random.normal((4, 64), key=mx.random.key(0))
W = mx.random.normal((128, 64), key=mx.random.key(1))
PACKED = mx.quantize(W, group_size=32, bits=4)


def test_automatic_and_packed_are_equal_eager_and_traced() -> None:
    """The two examples of the R interface: x 4 by 64, w 128 by 64, groups of 32."""
    automatic = qg.quantized_matmul(X, W, group_size=32, bits=4)
    packed = qg.quantized_matmul(X, *PACKED, group_size=32, bits=4)
    assert automatic.shape == (4, 128)
    assert mx.array_equal(automatic, packed)
    program = qg.compile(
        lambda x: (
            qg.quantized_matmul(x, W, group_size=32),
            qg.quantized_matmul(x, *PACKED, group_size=32),
        ),
        qg.spec((4, 64)),
    )
    first, second = program(X)
    assert mx.array_equal(first, second)
    assert mx.allclose(first, automatic, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [(m.name, bits, group) for m in MODES.values() for bits in m.bits for group in m.group_sizes],
)
def test_every_format_against_float64(
    mode: str, bits: int, group_size: int, transpose: bool
) -> None:
    w = mx.random.normal((128, 256), key=mx.random.key(2))
    x = mx.random.normal((3, 256 if transpose else 128), key=mx.random.key(3))
    program = qg.compile(
        lambda x: qg.quantized_matmul(
            x, w, transpose=transpose, group_size=group_size, bits=bits, mode=mode
        ),
        qg.spec(x.shape),
        target="cpu",
    )
    parts = mx.quantize(w, group_size=group_size, bits=bits, mode=mode)
    w_q, scales, *biases = [to_numpy(p) for p in parts]
    expected = reference.quantized_matmul(
        to_numpy(x), w_q, scales, biases[0] if biases else None, transpose, group_size, bits, mode
    )
    assert reference.relative_error(to_numpy(program(x)), expected) < 1e-5


def test_defaults_are_the_mode_s() -> None:
    for mode in MODES.values():
        graph = qg.trace(lambda x, m=mode: qg.quantized_matmul(x, W, mode=m.name), X)
        args = graph.nodes[-1].args
        assert (args["bits"], args["group_size"]) == (mode.bits[0], mode.group_sizes[0])


def test_device_per_call() -> None:
    graph = qg.trace(lambda x: qg.quantized_matmul(x, W, stream="cpu"), X)
    assert [n.stream for n in graph.nodes if n.op != "constant"] == ["cpu", "cpu"]
    assert mx.allclose(qg.compile(graph)(X), qg.quantized_matmul(X, W), atol=1e-5)


MISUSES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "group does not divide": (
        {"w": mx.ones((128, 96)), "x": mx.ones((4, 96))},
        ["group_size=64", "last axis of w, 96", "16 or 32"],
    ),
    "group not of the mode": ({"group_size": 16}, ["group_size=16", "'affine'", "32, 64 or 128"]),
    "bits not of the mode": ({"bits": 7}, ["bits=7", "'affine'", "2, 3, 4, 5, 6 or 8"]),
    "bits of mxfp4": ({"bits": 8, "mode": "mxfp4"}, ["bits=8", "'mxfp4'", "may be 4"]),
    "group of nvfp4": ({"group_size": 32, "mode": "nvfp4"}, ["group_size=32", "may be 16"]),
    "no such mode": ({"mode": "int4"}, ["mode='int4'", "affine, mxfp4, mxfp8 or nvfp4"]),
    "scales of the wrong shape": (
        {"w": PACKED[0], "scales": PACKED[1][:, :1], "biases": PACKED[2], "group_size": 32},
        ["scales have shape (128, 1)", "(128, 2)"],
    ),
    "scales of the wrong mode": (
        {"w": PACKED[0], "scales": PACKED[1], "mode": "mxfp4"},
        ["scales have dtype mlx.core.float32", "'mxfp4'", "uint8"],
    ),
    "biases missing": (
        {"w": PACKED[0], "scales": PACKED[1], "group_size": 32}, ["biases are missing", "affine"]
    ),
    "biases of the wrong shape": (
        {"w": PACKED[0], "scales": PACKED[1], "biases": PACKED[2][:5], "group_size": 32},
        ["biases have shape (5, 2)", "(128, 2)"],
    ),
    "biases without scales": (
        {"biases": mx.ones((128,))}, ["biases were given without scales", "output bias"]
    ),
    "packed without scales": ({"w": PACKED[0]}, ["uint32", "scales are missing"]),
    "scales of a float weight": (
        {"scales": PACKED[1], "biases": PACKED[2]}, ["w has dtype mlx.core.float32", "uint32"]
    ),
    "one axis": ({"w": mx.ones((64,))}, ["w has 1 axes", "2 axes or more"]),
    "integers": ({"w": mx.ones((128, 64), mx.int32)}, ["dtype mlx.core.int32", "float16"]),
    "no rows": ({"x": mx.ones((0, 64))}, ["x has no elements", "(0, 64)", "MLX ends the process"]),
    "no outputs": (
        {"w": PACKED[0][:0], "scales": PACKED[1][:0], "biases": PACKED[2][:0], "group_size": 32},
        ["w has no elements"],
    ),
    "inner sizes": ({"transpose": False}, ["last axis of x is 64", "transpose=True would fit"]),
}  # fmt: skip


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_with_words(name: str, traced: bool) -> None:
    changes, words = MISUSES[name]
    args = {"x": X, "w": W, **changes}

    def build(x: Any) -> Any:
        return qg.quantized_matmul(x, **{k: v for k, v in args.items() if k != "x"})

    run = (lambda x: qg.trace(build, x)) if traced else build
    with pytest.raises(QuantizationError) as caught:
        run(args["x"])
    text = str(caught.value)
    assert all(word in text for word in ["quantized_matmul", *words]), text
    assert "test_quantized_matmul.py" in text
    assert "return qg.quantized_matmul(" in text
