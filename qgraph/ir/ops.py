"""The table of operations: one line an op, its name and signature those of `mlx.core`.

An argument that holds a tensor becomes an input of the node; everything else is static.  Types
are inferred by calling MLX's own function on placeholders, so nothing is said of them here.
To add an op, add its line under the kind that fits (see CONTRIBUTING.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from ..kernels.chosen import (
    cached_attention,
    decode_attention,
    pack_weight,
    packed_gather,
    packed_matmul,
)
from .graph import Node


@dataclass(frozen=True)
class Op:
    """An entry: how the op is called and what it is.

    Attributes:
        name: as users call it, such as "softmax" or "fast.rms_norm".
        kind: the heading it stands under.
        fn: MLX's function, or the few lines here that stand for a method of `mx.array`.
        signature: parameters in MLX's order; `stream` is added to every op.
    """

    name: str
    kind: str
    fn: Callable[..., Any]
    signature: inspect.Signature

    @cached_property
    def scalar_operands(self) -> frozenset[str]:
        """Parameters whose Python numbers become 0-d constants."""
        if self.kind == "elementwise":
            return frozenset(self.signature.parameters)
        return frozenset({"condition", "x", "y"}) if self.name == "where" else frozenset()

    @cached_property
    def weak_operands(self) -> frozenset[str]:
        """Parameters whose numbers and NumPy arrays take their dtype from the tensors beside them.

        `logical_and` and its like are not among them: beside int8, 256 is true.
        """
        if self.name.startswith("logical_"):
            return frozenset()
        if self.kind == "elementwise":
            return frozenset(self.signature.parameters)
        return _WEAK.get(self.name, frozenset())

    @cached_property
    def _layout(
        self,
    ) -> tuple[tuple[tuple[str, Any], ...], str | None, tuple[tuple[str, Any], ...]]:
        parameters = self.signature.parameters.values()
        places = tuple((p.name, p.default) for p in parameters if p.kind < p.VAR_POSITIONAL)
        star = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), None)
        keywords = tuple((p.name, p.default) for p in parameters if p.kind == p.KEYWORD_ONLY)
        return places, star, keywords

    def call(self, args: Mapping[str, Any], stream: Any = None) -> Any:
        """Call MLX with arrays in the places of a node's values."""
        places, star, keywords = self._layout
        given = [_as_list(args.get(name, default)) for name, default in places]
        if star is not None:
            given.extend(args[star])
        named = {n: args[n] for n, default in keywords if n in args and args[n] is not default}
        if stream is not None and self.kind not in ("local", "chosen kernels"):
            named["stream"] = stream
        return self.fn(*given, **named)

    def __str__(self) -> str:
        return f"{self.name}{self.signature}".replace("mlx.core.", "")


_WEAK = {
    "where": frozenset({"x", "y"}),
    "clip": frozenset({"a", "a_min", "a_max"}),
    "array_equal": frozenset({"a", "b"}),
}


def _as_list(arg: Any) -> Any:
    """MLX takes several arrays as a list; a node keeps them as a tuple."""
    if isinstance(arg, tuple) and any(isinstance(a, mx.array) for a in arg):
        return list(arg)
    return arg


def getitem(a: mx.array, index: Any) -> mx.array:
    return a[tuple(index) if isinstance(index, list) else index]


def at_set(a: mx.array, index: Any, updates: Any) -> mx.array:
    result = mx.array(a)
    result[tuple(index) if isinstance(index, list) else index] = updates
    return result


def _at(method: str) -> Callable[..., mx.array]:
    def update(a: mx.array, index: Any, updates: Any) -> mx.array:
        place = a.at[tuple(index) if isinstance(index, list) else index]
        result: mx.array = getattr(place, method)(updates)
        return result

    return update


def keep(x: mx.array) -> mx.array:
    return x


_LOCAL: dict[str, Callable[..., Any]] = {
    "getitem": getitem,
    "at_set": at_set,
    "keep": keep,
    "cached_attention": cached_attention,
    "decode_attention": decode_attention,
    "pack_weight": pack_weight,
    "packed_matmul": packed_matmul,
    "packed_gather": packed_gather,
    **{f"at_{m}": _at(m) for m in ("add", "subtract", "multiply", "divide", "maximum", "minimum")},
}

_TABLE: dict[str, str] = {
    "elementwise": """
        abs(a, /)
        add(a, b)
        arccos(a, /)
        arccosh(a, /)
        arcsin(a, /)
        arcsinh(a, /)
        arctan(a, /)
        arctan2(a, b, /)
        arctanh(a, /)
        bitwise_and(a, b)
        bitwise_invert(a)
        bitwise_or(a, b)
        bitwise_xor(a, b)
        ceil(a, /)
        conjugate(a)
        cos(a, /)
        cosh(a, /)
        degrees(a, /)
        divide(a, b)
        divmod(a, b)
        equal(a, b)
        erf(a, /)
        erfinv(a, /)
        exp(a, /)
        expm1(a, /)
        floor(a, /)
        floor_divide(a, b)
        greater(a, b)
        greater_equal(a, b)
        imag(a, /)
        isfinite(a)
        isinf(a)
        isnan(a)
        isneginf(a)
        isposinf(a)
        left_shift(a, b)
        less(a, b)
        less_equal(a, b)
        log(a, /)
        log10(a, /)
        log1p(a, /)
        log2(a, /)
        logaddexp(a, b, /)
        logical_and(a, b, /)
        logical_not(a, /)
        logical_or(a, b, /)
        logical_xor(a, b, /)
        maximum(a, b, /)
        minimum(a, b, /)
        multiply(a, b)
        negative(a, /)
        not_equal(a, b)
        positive(a, /)
        power(a, b, /)
        radians(a, /)
        real(a, /)
        reciprocal(a, /)
        remainder(a, b)
        right_shift(a, b)
        rsqrt(a, /)
        sigmoid(a, /)
        sign(a, /)
        sin(a, /)
        sinh(a, /)
        sqrt(a, /)
        square(a, /)
        subtract(a, b)
        tan(a, /)
        tanh(a, /)
        trunc(a, /)
    """,
    "elementwise with settings": """
        astype(a, dtype, /)
        clip(a, /, a_min, a_max)
        from_fp8(x, dtype=bfloat16)
        isclose(a, b, /, rtol=1e-05, atol=1e-08, *, equal_nan=False)
        nan_to_num(a, nan=0, posinf=None, neginf=None)
        round(a, /, decimals=0)
        stop_gradient(a, /)
        to_fp8(x)
        view(a, dtype)
        where(condition, x, y, /)
    """,
    "reduction": """
        all(a, /, axis=None, keepdims=False)
        allclose(a, b, /, rtol=1e-05, atol=1e-08, *, equal_nan=False)
        any(a, /, axis=None, keepdims=False)
        argmax(a, /, axis=None, keepdims=False)
        argmin(a, /, axis=None, keepdims=False)
        array_equal(a, b, *, equal_nan=False)
        count_nonzero(a, /, *, axis=None, keepdims=False)
        logsumexp(a, /, axis=None, keepdims=False)
        max(a, /, axis=None, keepdims=False)
        mean(a, /, axis=None, keepdims=False)
        median(a, /, axis=None, keepdims=False)
        min(a, /, axis=None, keepdims=False)
        minmax(a, /, axis=None, keepdims=False)
        prod(a, /, axis=None, keepdims=False)
        softmax(a, /, axis=None, *, precise=False)
        std(a, /, axis=None, keepdims=False, ddof=0)
        sum(a, /, axis=None, keepdims=False)
        var(a, /, axis=None, keepdims=False, ddof=0)
    """,
    "cumulative": """
        cummax(a, /, axis=None, *, reverse=False, inclusive=True)
        cummin(a, /, axis=None, *, reverse=False, inclusive=True)
        cumprod(a, /, axis=None, *, reverse=False, inclusive=True, dtype=None)
        cumsum(a, /, axis=None, *, reverse=False, inclusive=True, dtype=None)
        diff(a, /, n=1, axis=-1)
        logcumsumexp(a, /, axis=None, *, reverse=False, inclusive=True)
    """,
    "shape": """
        atleast_1d(*arys)
        atleast_2d(*arys)
        atleast_3d(*arys)
        broadcast_arrays(*arrays)
        broadcast_to(a, /, shape)
        contiguous(a, /, allow_col_major=False)
        expand_dims(a, /, axis)
        flatten(a, /, start_axis=0, end_axis=-1)
        flip(a, /, axis=None)
        matrix_transpose(a, /)
        moveaxis(a, /, source, destination)
        reshape(a, /, shape)
        roll(a, shift, axis=None, /)
        squeeze(a, /, axis=None)
        swapaxes(a, /, axis1, axis2)
        transpose(a, /, axes=None)
        unflatten(a, /, axis, shape)
        as_strided(a, /, shape=None, strides=None, offset=0)
    """,
    "joining": """
        concatenate(arrays, axis=0)
        meshgrid(*arrays, sparse=False, indexing='xy')
        pad(a, pad_width, mode='constant', constant_values=0)
        repeat(array, repeats, axis=None)
        split(a, /, indices_or_sections, axis=0)
        stack(arrays, axis=0)
        tile(a, reps, /)
        unstack(x, /, *, axis=0)
    """,
    "local": """
        at_add(a, index, updates)
        at_divide(a, index, updates)
        at_maximum(a, index, updates)
        at_minimum(a, index, updates)
        at_multiply(a, index, updates)
        at_set(a, index, updates)
        at_subtract(a, index, updates)
        getitem(a, index)
        keep(x)
    """,
    "chosen kernels": """
        pack_weight(parts, problem, kernel)
        packed_matmul(x, packed, problem, kernel)
        packed_gather(x, packed, problem, kernel, lhs_indices=None, rhs_indices=None)
        decode_attention(q, k, v, last, scale, cores=0)
        cached_attention(q, k, v, keys, values, position, last, freqs=None, *, heads, rope, scale)
    """,
    "indexing": """
        diag(a, /, k=0)
        diagonal(a, offset=0, axis1=0, axis2=1)
        put_along_axis(a, /, indices, values, axis=None)
        searchsorted(sorted_sequence, values, /, side='left')
        slice(a, start_indices, axes, slice_size)
        slice_update(a, update, start_indices, axes)
        take(a, /, indices, axis=None)
        take_along_axis(a, /, indices, axis=-1)
        tril(x, k=0)
        triu(x, k=0)
    """,
    "sorting": """
        argpartition(a, /, kth, axis=-1)
        argsort(a, /, axis=-1)
        partition(a, /, kth, axis=-1)
        sort(a, /, axis=-1)
        topk(a, /, k, axis=-1)
        unique(a, /, size, return_index=False, return_inverse=False, return_counts=False,
               fill_value=None)
    """,
    "product": """
        addmm(c, a, b, /, alpha=1.0, beta=1.0)
        block_masked_mm(a, b, /, block_size=64, mask_out=None, mask_lhs=None, mask_rhs=None)
        einsum(subscripts, *operands)
        gather_mm(a, b, /, lhs_indices=None, rhs_indices=None, *, sorted_indices=False)
        hadamard_transform(a, scale=None)
        inner(a, b, /)
        kron(a, b)
        matmul(a, b, /)
        outer(a, b, /)
        segmented_mm(a, b, /, segments)
        tensordot(a, b, /, axes=2)
        vecdot(a, b, /, *, axis=-1)
    """,
    "convolution": """
        conv1d(input, weight, /, stride=1, padding=0, dilation=1, groups=1)
        conv2d(input, weight, /, stride=1, padding=0, dilation=1, groups=1)
        conv3d(input, weight, /, stride=1, padding=0, dilation=1, groups=1)
        conv_general(input, weight, /, stride=1, padding=0, kernel_dilation=1, input_dilation=1,
                     groups=1, flip=False)
        conv_transpose1d(input, weight, /, stride=1, padding=0, dilation=1, output_padding=0,
                         groups=1)
        conv_transpose2d(input, weight, /, stride=1, padding=0, dilation=1, output_padding=0,
                         groups=1)
        conv_transpose3d(input, weight, /, stride=1, padding=0, dilation=1, output_padding=0,
                         groups=1)
        convolve(a, v, /, mode='full')
    """,
    "creation": """
        arange(start, stop=None, step=None, dtype=None)
        eye(n, m=None, k=0, dtype=float32)
        full(shape, vals, dtype=None)
        full_like(a, vals, dtype=None)
        identity(n, dtype=float32)
        linspace(start, stop, num=50, endpoint=True, dtype=float32)
        ones(shape, dtype=float32)
        ones_like(a, /, dtype=None)
        tri(n, m=None, k=0, dtype=None)
        zeros(shape, dtype=float32)
        zeros_like(a, /, dtype=None)
        bartlett(M)
        blackman(M)
        hamming(M)
        hanning(M)
    """,
    "quantization": """
        dequantize(w, /, scales, biases=None, group_size=None, bits=None, mode='affine',
                   global_scale=None, dtype=None)
        gather_qmm(x, w, /, scales, biases=None, lhs_indices=None, rhs_indices=None,
                   transpose=True, group_size=None, bits=None, mode='affine', global_scale=None, *,
                   sorted_indices=False)
        gather_qqmm(x, w, /, scales=None, lhs_indices=None, rhs_indices=None, group_size=None,
                    bits=None, mode='nvfp4', global_scale_x=None, global_scale_w=None, *,
                    sorted_indices=False)
        qqmm(x, w, scales=None, group_size=None, bits=None, mode='nvfp4', global_scale_x=None,
             global_scale_w=None)
        quantize(w, /, group_size=None, bits=None, mode='affine', *, global_scale=None)
        quantized_matmul(x, w, /, scales, biases=None, transpose=True, group_size=None, bits=None,
                         mode='affine')
    """,
    "fast": """
        fast.cross_entropy(logits, targets)
        fast.gated_delta_update(q, k, v, gamma, beta, initial_state=None, mask=None)
        fast.layer_norm(x, weight, bias, eps)
        fast.rms_norm(x, weight, eps)
        fast.rope(a, dims, *, traditional, base, scale, offset, freqs=None)
        fast.scaled_dot_product_attention(q, k, v, *, scale, mask=None, sinks=None,
                                          force_fused=False)
    """,
    "random": """
        random.bernoulli(p=0.5, shape=None, key=None)
        random.categorical(logits, axis=-1, shape=None, num_samples=None, key=None)
        random.key(seed)
        random.gumbel(shape=(), dtype=float32, key=None)
        random.laplace(shape=(), dtype=float32, loc=0.0, scale=1.0, key=None)
        random.multivariate_normal(mean, cov, shape=(), dtype=float32, key=None)
        random.normal(shape=(), dtype=float32, loc=None, scale=None, key=None)
        random.permutation(x, axis=0, key=None)
        random.randint(low, high, shape=(), dtype=int32, key=None)
        random.split(key, num=2)
        random.truncated_normal(lower, upper, shape=None, dtype=float32, key=None)
        random.uniform(low=0, high=1, shape=(), dtype=float32, key=None)
    """,
    "fft": """
        fft.fft(a, n=None, axis=-1, norm='backward')
        fft.fft2(a, s=None, axes=(-2, -1), norm='backward')
        fft.fftn(a, s=None, axes=None, norm='backward')
        fft.fftshift(a, axes=None)
        fft.ifft(a, n=None, axis=-1, norm='backward')
        fft.ifft2(a, s=None, axes=(-2, -1), norm='backward')
        fft.ifftn(a, s=None, axes=None, norm='backward')
        fft.ifftshift(a, axes=None)
        fft.irfft(a, n=None, axis=-1, norm='backward')
        fft.irfft2(a, s=None, axes=(-2, -1), norm='backward')
        fft.irfftn(a, s=None, axes=None, norm='backward')
        fft.rfft(a, n=None, axis=-1, norm='backward')
        fft.rfft2(a, s=None, axes=(-2, -1), norm='backward')
        fft.rfftn(a, s=None, axes=None, norm='backward')
    """,
    "linear algebra": """
        linalg.cholesky(a, upper=False)
        linalg.cholesky_inv(a, upper=False)
        linalg.cross(a, b, axis=-1)
        linalg.det(a)
        linalg.eig(a)
        linalg.eigh(a, UPLO='L')
        linalg.eigvals(a)
        linalg.eigvalsh(a, UPLO='L')
        linalg.inv(a)
        linalg.lu(a)
        linalg.lu_factor(a)
        linalg.norm(a, /, ord=None, axis=None, keepdims=False)
        linalg.pinv(a)
        linalg.qr(a)
        linalg.slogdet(a)
        linalg.solve(a, b)
        linalg.solve_triangular(a, b, *, upper=False)
        linalg.svd(a, compute_uv=True)
        linalg.tri_inv(a, upper=False)
    """,
}

ALIASES = {
    "acos": "arccos",
    "acosh": "arccosh",
    "asin": "arcsin",
    "asinh": "arcsinh",
    "atan": "arctan",
    "atan2": "arctan2",
    "atanh": "arctanh",
    "bitwise_left_shift": "left_shift",
    "bitwise_right_shift": "right_shift",
    "concat": "concatenate",
    "conj": "conjugate",
    "cumulative_prod": "cumprod",
    "cumulative_sum": "cumsum",
    "permute_dims": "transpose",
    "pow": "power",
}

LEFT_OUT = {
    "asarray": "makes an array from Python data; call mx.asarray before tracing",
    "array": "makes an array; call mx.array before tracing",
    "broadcast_shapes": "computes on shapes, not on arrays",
    "can_cast": "answers about dtypes, not about arrays",
    "checkpoint": "for training; qgraph is for inference",
    "custom_function": "for training; call the function itself",
    "depends": "orders evaluation, which qgraph does itself",
    "einsum_path": "returns a plan, not an array",
    "empty": "its contents are not defined; use zeros",
    "empty_like": "its contents are not defined; use zeros_like",
    "from_dlpack": "makes an array from another library's; call it before tracing",
    "grad": "a transformation of functions for training",
    "isdtype": "answers about dtypes",
    "issubdtype": "answers about dtypes",
    "jvp": "a transformation of functions for training",
    "matrix_norm": "call qg.linalg.norm",
    "result_type": "answers about dtypes",
    "trace": "qg.trace traces a function; write qg.sum(qg.diagonal(x))",
    "value_and_grad": "a transformation of functions for training",
    "vjp": "a transformation of functions for training",
    "vmap": "a transformation of functions; qgraph graphs are batched by hand",
}


def _parse(kind: str, lines: str) -> list[Op]:
    entries: list[str] = []
    for line in lines.strip().splitlines():
        if entries and entries[-1].count("(") > entries[-1].count(")"):
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    ops = []
    for entry in entries:
        name, parameters = entry.split("(", 1)
        function = eval(f"lambda {parameters[:-1]}: None", vars(mx))
        fn = _LOCAL.get(name) or _resolve(name)
        ops.append(Op(name, kind, fn, inspect.signature(function)))
    return ops


def _resolve(name: str) -> Callable[..., Any]:
    found: Any = mx
    for part in name.split("."):
        found = getattr(found, part)
    fn: Callable[..., Any] = found
    return fn


OPS: dict[str, Op] = {op.name: op for kind, lines in _TABLE.items() for op in _parse(kind, lines)}

RANDOM = frozenset(name for name, op in OPS.items() if "key" in op.signature.parameters)
"""Ops that draw from a key; without one MLX would draw from a state outside the graph."""


def namespace(prefix: str, functions: Mapping[str, Any]) -> SimpleNamespace:
    """The functions below a dot, such as those of `qg.fast`."""
    start = prefix + "."
    return SimpleNamespace(
        **{n[len(start) :]: f for n, f in functions.items() if n.startswith(start)}
    )


def setting(node: Node, name: str) -> Any:
    """A static argument of a node, or the op's default."""
    if name in node.args:
        return node.args[name]
    return OPS[node.op].signature.parameters[name].default
