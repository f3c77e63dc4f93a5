"""The table of operations: one line an op, its name and signature those of `mlx.core`.

An argument that holds a tensor becomes an input of the node; everything else is static.  Types
are inferred by calling MLX's own function on placeholders, so nothing is said of them here.
After the signature stands what else must be known of an op, in the words of `kinds.py`: what it
costs first, if that is not what all of its kind do.  To add an op, add its line under the kind that
fits (see CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from .graph import Node
from .op import Op, parse

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
        positive(a, /): view, same elements
        power(a, b, /)
        radians(a, /)
        real(a, /)
        reciprocal(a, /)
        remainder(a, b)
        right_shift(a, b)
        rsqrt(a, /)
        sigmoid(a, /): own
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
        astype(a, dtype, /): each, same elements
        clip(a, /, a_min, a_max)
        from_fp8(x, dtype=bfloat16)
        isclose(a, b, /, rtol=1e-05, atol=1e-08, *, equal_nan=False)
        nan_to_num(a, nan=0, posinf=None, neginf=None)
        round(a, /, decimals=0)
        stop_gradient(a, /): view, same elements
        to_fp8(x)
        view(a, dtype): view
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
        logsumexp(a, /, axis=None, keepdims=False): own
        max(a, /, axis=None, keepdims=False)
        mean(a, /, axis=None, keepdims=False)
        median(a, /, axis=None, keepdims=False)
        min(a, /, axis=None, keepdims=False)
        minmax(a, /, axis=None, keepdims=False)
        prod(a, /, axis=None, keepdims=False)
        softmax(a, /, axis=None, *, precise=False): own
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
        atleast_1d(*arys): view
        atleast_2d(*arys): view
        atleast_3d(*arys): view
        broadcast_arrays(*arrays): view, strided
        broadcast_to(a, /, shape): view, same elements, strided
        contiguous(a, /, allow_col_major=False): move, same elements
        expand_dims(a, /, axis): view, same elements, strided
        flatten(a, /, start_axis=0, end_axis=-1): view, same elements
        flip(a, /, axis=None): each
        matrix_transpose(a, /): view, same elements, strided
        moveaxis(a, /, source, destination): view, same elements, strided
        reshape(a, /, shape): view, same elements
        roll(a, shift, axis=None, /): move
        squeeze(a, /, axis=None): view, same elements, strided
        swapaxes(a, /, axis1, axis2): view, same elements, strided
        transpose(a, /, axes=None): view, same elements, strided
        unflatten(a, /, axis, shape): view, same elements
        as_strided(a, /, shape=None, strides=None, offset=0): view, strided
    """,
    "joining": """
        concatenate(arrays, axis=0): move
        meshgrid(*arrays, sparse=False, indexing='xy'): each
        pad(a, pad_width, mode='constant', constant_values=0): move
        repeat(array, repeats, axis=None): move
        split(a, /, indices_or_sections, axis=0): move, strided
        stack(arrays, axis=0): move
        tile(a, reps, /): move
        unstack(x, /, *, axis=0): move
    """,
    "local": """
        at_add(a, index, updates): update
        at_divide(a, index, updates): update
        at_maximum(a, index, updates): update
        at_minimum(a, index, updates): update
        at_multiply(a, index, updates): update
        at_set(a, index, updates): write
        at_subtract(a, index, updates): update
        getitem(a, index): pick, strided
        keep(x): view
    """,
    "chosen kernels": """
        pack_weight(parts, problem, kernel): each
        packed_matmul(x, packed, problem, kernel): own
        packed_gather(x, packed, problem, kernel, lhs_indices=None, rhs_indices=None): own, gathers
        packed_rows(packed, indices, problem, kernel): pick
        decode_attention(q, k, v, last, scale, cores=0, first=None, window=0, mask=None,
                         sinks=None): own
        cached_attention(q, k, v, keys, values, position, last, freqs=None, offset=None,
                         sinks=None, *, heads, rope, scale, window=0): own
        tail_attention(q, k, v, keys, values, tail_keys, tail_values, tail_positions, position,
                       last, freqs=None, offset=None, sinks=None, *, heads, rope, scale,
                       window=0): own
        merge_tail(cache, tail, positions): move
    """,
    "collective": """
        distributed.all_gather(x, ranks=None): move
        distributed.all_max(x): each
        distributed.all_min(x): each
        distributed.all_sum(x): each
        distributed.join(x, axis, length, ranks): move
        distributed.recv(shape, dtype, src): move
        distributed.send(x, dst): move
        distributed.sum_scatter(x, ranks=None): each
    """,
    "placement": """
        distributed.part(x, axis, size, ranks): pick
        replicate(x): view, same elements
        shard(x, axis): view, same elements
    """,
    "indexing": """
        diag(a, /, k=0): each
        diagonal(a, offset=0, axis1=0, axis2=1): each, strided
        put_along_axis(a, /, indices, values, axis=None): write
        searchsorted(sorted_sequence, values, /, side='left'): each
        slice(a, start_indices, axes, slice_size): pick, strided
        slice_update(a, update, start_indices, axes): write
        take(a, /, indices, axis=None): pick
        take_along_axis(a, /, indices, axis=-1): pick
        tril(x, k=0): each
        triu(x, k=0): each
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
        addmm(c, a, b, /, alpha=1.0, beta=1.0): own, by a weight
        block_masked_mm(a, b, /, block_size=64, mask_out=None, mask_lhs=None, mask_rhs=None): each
        einsum(subscripts, *operands): each, by a weight
        gather_mm(a, b, /, lhs_indices=None, rhs_indices=None, *,
                  sorted_indices=False): own, by a weight, gathers
        hadamard_transform(a, scale=None): each
        inner(a, b, /): each, by a weight
        kron(a, b): each
        matmul(a, b, /): own, by a weight
        outer(a, b, /): each
        segmented_mm(a, b, /, segments): each
        tensordot(a, b, /, axes=2): each, by a weight
        vecdot(a, b, /, *, axis=-1): each
    """,
    "convolution": """
        conv1d(input, weight, /, stride=1, padding=0, dilation=1, groups=1): own
        conv2d(input, weight, /, stride=1, padding=0, dilation=1, groups=1): own
        conv3d(input, weight, /, stride=1, padding=0, dilation=1, groups=1): own
        conv_general(input, weight, /, stride=1, padding=0, kernel_dilation=1, input_dilation=1,
                     groups=1, flip=False): own
        conv_transpose1d(input, weight, /, stride=1, padding=0, dilation=1, output_padding=0,
                         groups=1): each
        conv_transpose2d(input, weight, /, stride=1, padding=0, dilation=1, output_padding=0,
                         groups=1): each
        conv_transpose3d(input, weight, /, stride=1, padding=0, dilation=1, output_padding=0,
                         groups=1): each
        convolve(a, v, /, mode='full'): each
    """,
    "creation": """
        arange(start, stop=None, step=None, dtype=None): move
        eye(n, m=None, k=0, dtype=float32): move
        full(shape, vals, dtype=None): move
        full_like(a, vals, dtype=None): move
        identity(n, dtype=float32): move
        linspace(start, stop, num=50, endpoint=True, dtype=float32): move
        ones(shape, dtype=float32): move
        ones_like(a, /, dtype=None): move
        tri(n, m=None, k=0, dtype=None): move
        zeros(shape, dtype=float32): move
        zeros_like(a, /, dtype=None): move
        bartlett(M): each
        blackman(M): each
        hamming(M): each
        hanning(M): each
    """,
    "quantization": """
        dequantize(w, /, scales, biases=None, group_size=None, bits=None, mode='affine',
                   global_scale=None, dtype=None): own
        gather_qmm(x, w, /, scales, biases=None, lhs_indices=None, rhs_indices=None,
                   transpose=True, group_size=None, bits=None, mode='affine', global_scale=None, *,
                   sorted_indices=False): own, by a weight, gathers
        gather_qqmm(x, w, /, scales=None, lhs_indices=None, rhs_indices=None, group_size=None,
                    bits=None, mode='nvfp4', global_scale_x=None, global_scale_w=None, *,
                    sorted_indices=False): each
        qqmm(x, w, scales=None, group_size=None, bits=None, mode='nvfp4', global_scale_x=None,
             global_scale_w=None): each
        quantize(w, /, group_size=None, bits=None, mode='affine', *, global_scale=None): own
        quantized_matmul(x, w, /, scales, biases=None, transpose=True, group_size=None, bits=None,
                         mode='affine'): own, by a weight
    """,
    "fast": """
        fast.cross_entropy(logits, targets): each
        fast.gated_delta_update(q, k, v, gamma, beta, initial_state=None, mask=None): each
        fast.layer_norm(x, weight, bias, eps): own
        fast.rms_norm(x, weight, eps): own
        fast.rope(a, dims, *, traditional, base, scale, offset, freqs=None): own
        fast.scaled_dot_product_attention(q, k, v, *, scale, mask=None, sinks=None,
                                          force_fused=False): own
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


OPS: dict[str, Op] = {op.name: op for kind, lines in _TABLE.items() for op in parse(kind, lines)}

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
