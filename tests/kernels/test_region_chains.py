"""Chains of elementwise operations in the engine of regions, against NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.support.compiler import needs_compiler
from tests.support.regions import BF16, FLOATS, Array, Chain, Steps, as_dtype, close, wide

pytestmark = needs_compiler

erf = np.vectorize(math.erf)
ANY = np.concatenate(
    [np.linspace(-12, 12, 991), [0.0, -0.0, 1e-30, -1e30, np.inf, -np.inf, np.nan]]
)
POSITIVE = np.concatenate([np.geomspace(1e-38, 1e38, 991), [0.0, -1.0, np.inf, np.nan, 1e-42]])
UNIT = np.linspace(-1, 1, 999)

FUNCTIONS: dict[str, Any] = {
    "ABS": np.abs, "NEGATIVE": np.negative, "SQUARE": np.square, "RECIPROCAL": lambda x: 1 / x,
    "SIGN": lambda x: np.where(np.isnan(x), 0, np.sign(x)),
    "EXP": np.exp, "EXPM1": np.expm1, "SIGMOID": lambda x: 1 / (1 + np.exp(-x)), "TANH": np.tanh,
    "ERF": erf, "SIN": np.sin, "COS": np.cos, "TAN": np.tan, "SINH": np.sinh, "COSH": np.cosh,
    "ARCTAN": np.arctan, "ARCSINH": np.arcsinh, "FLOOR": np.floor, "CEIL": np.ceil,
    "ROUND": np.rint, "TRUNC": np.trunc, "SILU": lambda x: x / (1 + np.exp(-x)),
    "RELU": lambda x: np.maximum(x, 0),
}  # fmt: skip
OF_POSITIVE: dict[str, Any] = {
    "SQRT": np.sqrt, "RSQRT": lambda x: 1 / np.sqrt(x), "LOG": np.log, "LOG2": np.log2,
    "LOG10": np.log10, "LOG1P": np.log1p,
}  # fmt: skip
OF_UNIT: dict[str, Any] = {
    "ARCSIN": np.arcsin, "ARCCOS": np.arccos, "ARCTANH": np.arctanh,
    "GELU": lambda x: x * (0.5 + 0.5 * erf(x / np.sqrt(2))),
    "GELU_TANH": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}  # fmt: skip
CASES = [(name, f, ANY) for name, f in FUNCTIONS.items()]
CASES += [(name, f, POSITIVE) for name, f in OF_POSITIVE.items()]
CASES += [(name, f, UNIT) for name, f in OF_UNIT.items()]


def unary(name: str, x: Array, out: Any = None) -> Array:
    y = np.zeros(x.shape, x.dtype if out is None else out)
    chain = Chain(x)
    chain.to(chain.do(name, x.dtype, 0), y).step(steps := Steps())
    steps.run()
    return y


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("name", "function", "points"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_functions(name: str, function: Any, points: Array, dtype: Any) -> None:
    with np.errstate(all="ignore"):
        x = as_dtype(points, dtype)
        want = (
            wide(as_dtype(function(wide(x)), dtype)) if dtype != np.float32 else function(wide(x))
        )
        if dtype == np.float32:
            want = np.where(np.abs(want) > 3.4028235e38, np.sign(want) * np.inf, want)
    close(unary(name, x), want, 1.01 if dtype != np.float32 else 4 if "GELU" in name else 3)


def test_erfinv_and_tests_for_what_is_not_finite() -> None:
    x = np.concatenate([np.linspace(-0.9999, 0.9999, 501), [1.0, -1.0, 2.0]]).astype(np.float32)
    y = unary("ERFINV", x)
    np.testing.assert_allclose(erf(wide(y[:501])), x[:501], atol=1e-6)
    assert y[501:503].tolist() == [np.inf, -np.inf]
    assert np.isnan(y[503])
    x = as_dtype(ANY, np.float32)
    for name, function in (
        ("ISNAN", np.isnan), ("ISINF", np.isinf), ("ISFINITE", np.isfinite),
        ("ISPOSINF", np.isposinf), ("ISNEGINF", np.isneginf),
    ):  # fmt: skip
        np.testing.assert_array_equal(unary(name, x, np.bool_), function(x))


def log_add(a: Array, b: Array) -> Array:
    return np.logaddexp(a, b)


PAIRS: dict[str, Any] = {
    "ADD": np.add, "SUBTRACT": np.subtract, "MULTIPLY": np.multiply, "DIVIDE": np.divide,
    "MAXIMUM": np.maximum, "MINIMUM": np.minimum, "POWER": np.power, "ARCTAN2": np.arctan2,
    "LOGADDEXP": log_add, "REMAINDER": np.remainder, "FLOOR_DIVIDE": np.floor_divide,
}  # fmt: skip
TESTS: dict[str, Any] = {
    "EQUAL": np.equal, "NOT_EQUAL": np.not_equal, "LESS": np.less, "LESS_EQUAL": np.less_equal,
    "GREATER": np.greater, "GREATER_EQUAL": np.greater_equal,
}  # fmt: skip


def binary(name: str, a: Array, b: Array, out: Any = None) -> Array:
    y = np.zeros(np.broadcast_shapes(a.shape, b.shape), a.dtype if out is None else out)
    chain = Chain(a, b)
    chain.to(chain.do(name, a.dtype, 0, 1), y).step(steps := Steps())
    steps.run()
    return y


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pairs_of_floats(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    points = np.array([0.0, 1.5, -2.0, 3.25, np.inf, -np.inf, np.nan])
    a = as_dtype(np.concatenate([rng.normal(0, 3, 700), np.repeat(points, 7)]), dtype)
    b = as_dtype(np.concatenate([rng.normal(0, 3, 700), np.tile(points, 7)]), dtype)
    with np.errstate(all="ignore"):
        for name, function in PAIRS.items():
            want = function(wide(a), wide(b))
            if name in ("REMAINDER", "FLOOR_DIVIDE"):
                keep = np.isfinite(wide(a)) & np.isfinite(wide(b)) & (wide(b) != 0)
                want = (
                    wide(a) - np.floor(wide(a) / wide(b)) * wide(b)
                    if name == "REMAINDER"
                    else np.floor(wide(a) / wide(b))
                )
            else:
                keep = np.ones(a.shape, np.bool_)
            got = binary(name, a, b)
            near = np.abs(want[keep]) if name == "LOGADDEXP" else None
            tolerance = 2e-6 if near is not None and dtype == np.float32 else 0.0
            np.testing.assert_allclose(
                wide(got)[keep], wide(as_dtype(want, dtype))[keep],
                rtol=3e-7 if dtype == np.float32 else 1.01 * 2.0 ** (-7 if dtype == BF16 else -10),
                atol=tolerance or (1e-6 if name == "REMAINDER" else 0), err_msg=name,
            )  # fmt: skip
        for name, function in TESTS.items():
            np.testing.assert_array_equal(
                binary(name, a, b, np.bool_), function(wide(a), wide(b)), name
            )


BITS: dict[str, Any] = {
    "BITWISE_AND": np.bitwise_and,
    "BITWISE_OR": np.bitwise_or,
    "BITWISE_XOR": np.bitwise_xor,
}
OF_BOOL: dict[str, Any] = {
    "LOGICAL_AND": np.logical_and, "LOGICAL_OR": np.logical_or, "BITWISE_XOR": np.logical_xor,
    "ADD": np.logical_or, "MULTIPLY": np.logical_and, "MAXIMUM": np.logical_or,
}  # fmt: skip
INTEGERS = [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda d: d.__name__)
def test_integers(dtype: Any) -> None:
    info = np.iinfo(dtype)
    edges = np.array([info.min, info.max, info.min + 1, info.max - 1, 0, 1, 2, 7, 100], dtype)
    a, b = np.repeat(edges, 9), np.tile(edges, 9)
    with np.errstate(all="ignore"):
        for name, function in {**PAIRS, **TESTS, **BITS}.items():
            if name in ("DIVIDE", "ARCTAN2", "LOGADDEXP", "POWER"):
                continue
            whole = b != 0 if name in ("REMAINDER", "FLOOR_DIVIDE") else b == b
            got = binary(name, a, b, np.bool_ if name in TESTS else None)
            np.testing.assert_array_equal(got[whole], function(a, b)[whole], name)
        for name, function in {"ABS": np.abs, "NEGATIVE": np.negative, "SQUARE": np.square,
                               "SIGN": np.sign, "BITWISE_INVERT": np.invert}.items():  # fmt: skip
            np.testing.assert_array_equal(unary(name, a), function(a), name)
        shifts = np.resize(np.arange(info.bits, dtype=dtype), a.size)
        np.testing.assert_array_equal(binary("LEFT_SHIFT", a, shifts), a << shifts)
        np.testing.assert_array_equal(binary("RIGHT_SHIFT", a, shifts), a >> shifts)
        small = np.resize(np.arange(5, dtype=dtype), a.size)
        np.testing.assert_array_equal(binary("POWER", a, small), a**small)


def test_bool() -> None:
    a, b = np.array([True, True, False, False]), np.array([True, False, True, False])
    for name, function in OF_BOOL.items():
        np.testing.assert_array_equal(binary(name, a, b), function(a, b), name)
    np.testing.assert_array_equal(unary("LOGICAL_NOT", a), ~a)


@pytest.mark.parametrize("source", [np.bool_, *INTEGERS, *FLOATS], ids=str)
@pytest.mark.parametrize("target", [np.bool_, *INTEGERS, *FLOATS], ids=str)
def test_casts(source: Any, target: Any) -> None:
    x = as_dtype(np.array([0, 1, 2, 3.75, 100, 0.5, 17] * 40), source)
    y = np.zeros(x.shape, target)
    chain = Chain(x)
    chain.to(chain.do("CAST", target, 0), y).step(steps := Steps())
    steps.run()
    want = wide(x) != 0 if target is np.bool_ else wide(x)
    np.testing.assert_array_equal(wide(y), wide(as_dtype(want, target)))


def test_bits_of_other_types() -> None:
    x = np.random.default_rng(1).normal(size=300).astype(np.float32)
    bits = np.zeros(300, np.int32)
    back = np.zeros(300, np.float32)
    chain = Chain(x)
    number = chain.do("BITCAST", np.int32, 0)
    chain.to(number, bits).to(chain.do("BITCAST", np.float32, number), back).step(steps := Steps())
    steps.run()
    np.testing.assert_array_equal(bits, x.view(np.int32))
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_chain_rounds_after_each_operation_and_broadcasts(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    a = as_dtype(rng.normal(size=(5, 1, 70)), dtype)
    b = as_dtype(rng.normal(size=(3, 1)), dtype)
    c = as_dtype(rng.normal(size=(3, 70, 5)), dtype).transpose(2, 0, 1)
    y, z = np.zeros((5, 3, 70), dtype), np.zeros((5, 3, 70), np.bool_)
    chain = Chain(a, b, c)
    product = chain.do("MULTIPLY", dtype, 0, 1)
    shifted = chain.do("ADD", dtype, product, chain.do("CONST", dtype, value=0.3))
    less = chain.do("LESS", dtype, shifted, 2)
    chosen = chain.do("WHERE", dtype, less, shifted, 2)
    chain.to(chosen, y).to(less, z).step(steps := Steps())
    steps.run()

    def r(x: Array) -> Array:
        return wide(as_dtype(x, dtype))

    want = r(r(wide(a) * wide(b)) + r(np.array([0.3], np.float32)))
    np.testing.assert_array_equal(z, want < wide(c))
    np.testing.assert_array_equal(wide(y), np.minimum(want, wide(c)))


def test_positions_are_counted_and_written_in_place() -> None:
    x = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    chain = Chain(x)
    rows = chain.do("IOTA", np.int32, value=1)
    columns = chain.do("CAST", np.int32, chain.do("IOTA", np.float32, value=2))
    chain.to(chain.do("ADD", np.int32, chain.do("MULTIPLY", np.int32, rows, 0), columns), x)
    want = x * np.arange(3)[:, None] + np.arange(4)
    chain.step(Steps()).run()
    np.testing.assert_array_equal(x, want)
    number = np.zeros((), np.int32)
    chain = Chain(number)
    chain.to(chain.do("ADD", np.int32, 0, chain.do("CONST", np.int32, value=5)), number)
    chain.step(Steps()).run()
    assert number == 5
