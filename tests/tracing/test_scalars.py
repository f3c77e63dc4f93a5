"""Numbers beside tensors: an op in a trace gives what MLX gives, value and dtype, or raises too."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.compiler.first_difference import values
from qgraph.errors import ShapeError
from qgraph.ir.ops import OPS
from tests.support.arrays import to_numpy

DTYPES = [
    mx.bool_, mx.uint8, mx.int8, mx.uint32, mx.int32, mx.int64, mx.uint64,
    mx.float16, mx.bfloat16, mx.float32, mx.complex64,
]  # fmt: skip
SOME = [mx.bool_, mx.int8, mx.uint32, mx.float16, mx.complex64]
"""For ops that MLX gives their numbers as it does to others; all of them on demand."""

NUMBERS: list[Any] = [
    True, False, 0, 1, -1, 3, 100, 200, 255, 256, -129, 70000, 2**31 - 1, 2**31, -(2**31) - 1,
    2**40, 2**63 - 1, 2**63, 0.0, -0.0, 0.5, 1e-9, 1e-50, 1e39, 65520.0, float("inf"),
    float("nan"), 1j, 0j, 2 + 0j, np.float32(0.1), np.float64(0.1), np.float16(0.1), np.int8(3),
    np.int64(2**40), np.bool_(True), np.complex64(1j), np.array(0.1), np.array([1, 2, 3, 4]),
]  # fmt: skip
SMALL = [1, 3, 0.5, -1]
"""Where others end the process in MLX (integer division by zero) or are not defined (shifts)."""

BINARY = [
    n for n, op in OPS.items() if op.kind == "elementwise" and len(op.signature.parameters) == 2
]
PICKY = {"floor_divide", "remainder", "divmod", "left_shift", "right_shift"}


def of_mlx(fn: Callable[..., Any], x: mx.array) -> list[mx.array] | str:
    try:
        result = fn(mx, x)
        arrays = list(result) if isinstance(result, list | tuple) else [result]
        mx.eval(arrays)
    except (ValueError, TypeError, RuntimeError):
        return "refused"
    return arrays


def of_graph(fn: Callable[..., Any], x: mx.array) -> list[mx.array] | str:
    try:
        graph = qg.trace(lambda t: fn(qg, t), x)
    except ShapeError:
        return "refused"
    env = values(graph, [x], mx.Device(mx.cpu, 0))
    return [env[v] for v in graph.outputs]


def alike(found: list[mx.array] | str, wanted: list[mx.array] | str) -> bool:
    if isinstance(found, str) or isinstance(wanted, str):
        return found == wanted
    return all(
        a.dtype == b.dtype and np.array_equal(to_numpy(a), to_numpy(b), equal_nan=a.dtype.size > 1)
        for a, b in zip(found, wanted, strict=True)
    )


def differences(
    fn: Callable[[Any, Any, Any], Any], dtype: mx.Dtype, numbers: list[Any]
) -> list[Any]:
    x = mx.array([1, 1, 1, 1] if numbers is SMALL else [0, 1, 2, 7]).astype(dtype)
    return [
        n
        for n in numbers
        if not alike(
            of_graph(lambda m, t, n=n: fn(m, t, n), x), of_mlx(lambda m, t, n=n: fn(m, t, n), x)
        )
    ]


@pytest.mark.parametrize("name", BINARY)
def test_binary_ops(name: str) -> None:
    numbers = SMALL if name in PICKY else NUMBERS
    thorough = "QGRAPH_EXAMPLES" in os.environ or name in ("add", "logical_and", "maximum", "power")
    for dtype in DTYPES if thorough else SOME:
        assert not differences(lambda m, x, n: getattr(m, name)(x, n), dtype, numbers), dtype
        assert not differences(lambda m, x, n: getattr(m, name)(n, x), dtype, numbers), dtype


def set_first(m: Any, x: Any, n: Any) -> Any:
    y = x * 1
    y[0] = n
    return y


OTHERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "where x": lambda m, x, n: m.where(x == 1, n, x),
    "where y": lambda m, x, n: m.where(x == 1, x, n),
    "where condition": lambda m, x, n: m.where(n, x, x + x),
    "where both": lambda m, x, n: m.where(x == 1, n, 1),
    "clip": lambda m, x, n: m.clip(x, n, n),
    "array_equal": lambda m, x, n: m.array_equal(x, n),
    "+": lambda m, x, n: x + n,
    "==": lambda m, x, n: x == n,
    "!=": lambda m, x, n: x != n,
    "&": lambda m, x, n: x & n,
}
PYTHON: dict[str, Callable[[Any, Any, Any], Any]] = {
    "pad": lambda m, x, n: m.pad(x, 1, constant_values=n),
    "full_like": lambda m, x, n: m.full_like(x, n),
    "at add": lambda m, x, n: x.at[0].add(n),
    "at maximum": lambda m, x, n: x.at[1:].maximum(n),
    "setitem": set_first,
    "number -": lambda m, x, n: n - x,
    "number **": lambda m, x, n: n**x,
    "number <": lambda m, x, n: n < x,
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_places_for_numbers(case: str) -> None:
    for dtype in SOME:
        assert not differences(OTHERS[case], dtype, NUMBERS), dtype


@pytest.mark.parametrize("case", PYTHON)
def test_places_for_numbers_of_python(case: str) -> None:
    """NumPy's own operators come first where its scalar stands to the left."""
    numbers = [n for n in NUMBERS if not isinstance(n, np.ndarray | np.generic)]
    for dtype in SOME:
        assert not differences(PYTHON[case], dtype, numbers), dtype


def test_nothing_else_equals_a_tensor() -> None:
    for other in (None, "a", [1.0]):
        assert (qg.tensor([1.0]) == other) is False
        assert (qg.tensor([1.0]) != other) is True


def test_an_integer_out_of_range_names_the_op_and_the_line() -> None:
    with pytest.raises(ShapeError, match="minimum: Converting 2147483648 to int32") as caught:
        qg.trace(lambda x: qg.minimum(x, 2**31), qg.spec((2,), mx.int32))
    assert "test_scalars.py" in str(caught.value)


@pytest.mark.parametrize(
    ("fn", "x"),
    [
        (lambda x: x * 1, mx.array([complex("inf"), complex(0, float("-inf"))])),
        (lambda x: x / 1, mx.array([complex("inf"), complex(1, 2)])),
        (lambda x: x - mx.array(-0.0), mx.array([-0.0, 1.0])),
        (lambda x: x - 0, mx.array([-0.0, float("nan")])),
        (lambda x: x - 0, mx.array([complex(-0.0, -0.0)])),
        (lambda x: x * 1, mx.array([-0.0, float("nan"), float("inf")])),
    ],
)
def test_what_has_no_effect_has_none_on_special_values(fn: Any, x: mx.array) -> None:
    graph = qg.optimize(qg.trace(fn, x), target="cpu").graph
    # Node by node: mx.compile (0.32.4) itself writes -0 as 0 and divides otherwise.
    found = np.array(values(graph, [x], mx.Device(mx.cpu, 0))[graph.outputs[0]])
    wanted = np.array(fn(x))
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found.real), np.signbit(wanted.real))
    assert np.array_equal(np.signbit(found.imag), np.signbit(wanted.imag))
