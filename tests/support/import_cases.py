"""Functions that between them use every primitive which MLX's export hands over on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from tests.importer.test_import import CUBE, INTS, KEY, SPD, X

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


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
    "absolute values of complex numbers": (
        lambda x: [mx.abs(mx.fft.fft(x)), mx.linalg.norm(mx.fft.rfft(x)), abs(x + 1j) + 1], (X,)),
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
