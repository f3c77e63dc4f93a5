"""MLX's primitives, as `mx.export_function` hands them over, in terms of ops of the table.

An entry takes the inputs (tensors), the arguments of the primitive's state and the types of its
outputs, and gives a tensor or a list.  What arguments mean is in MLX's `primitives.h`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..functions import FUNCTIONS as F
from ..types import TensorType

Entry = Callable[[Sequence[Any], Sequence[Any], Sequence[TensorType]], Any]

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
REDUCTIONS = ("all", "any", "sum", "prod", "min", "max")
SCANS = ("cummax", "cummin", "cumsum", "cumprod", "logcumsumexp")
UPDATES = ("at_maximum", "at_minimum", "at_add", "at_multiply", "at_set")
BITWISE = ("bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift")

ELEMENTWISE = {
    "Abs": "abs", "Add": "add", "ArcCos": "arccos", "ArcCosh": "arccosh", "ArcSin": "arcsin",
    "ArcSinh": "arcsinh", "ArcTan": "arctan", "ArcTan2": "arctan2", "ArcTanh": "arctanh",
    "Ceil": "ceil", "Conjugate": "conjugate", "Cos": "cos", "Cosh": "cosh", "Divide": "divide",
    "DivMod": "divmod", "Erf": "erf", "ErfInv": "erfinv", "Exp": "exp", "Expm1": "expm1",
    "Floor": "floor", "FloorDivide": "floor_divide", "Greater": "greater",
    "GreaterEqual": "greater_equal", "Imag": "imag", "Less": "less", "LessEqual": "less_equal",
    "Log1p": "log1p", "LogicalNot": "logical_not", "LogicalAnd": "logical_and",
    "LogicalOr": "logical_or", "LogAddExp": "logaddexp", "Maximum": "maximum",
    "Minimum": "minimum", "Multiply": "multiply", "Negative": "negative",
    "NotEqual": "not_equal", "Power": "power", "Real": "real", "Remainder": "remainder",
    "Round": "round", "Select": "where", "Sigmoid": "sigmoid", "Sign": "sign", "Sin": "sin",
    "Sinh": "sinh", "Square": "square", "Subtract": "subtract", "Tan": "tan", "Tanh": "tanh",
    "Matmul": "matmul", "StopGradient": "stop_gradient",
}  # fmt: skip


def _each(name: str) -> Entry:
    return lambda i, a, o: F[name](*i)


def _arange(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    whole = mx.issubdtype(o[0].dtype, mx.integer)
    start, stop, step = (int(v) if whole else float(v) for v in a)
    return F["arange"](start, stop, step, dtype=o[0].dtype)


def _equal(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    same = F["equal"](*i)
    if not (a and a[0]):
        return same
    return F["logical_or"](same, F["logical_and"](F["isnan"](i[0]), F["isnan"](i[1])))


def _broadcast(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    return F["broadcast_to"](i[0], o[0].shape)


def _reshape(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    return F["reshape"](i[0], o[0].shape)


def _convolution(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    stride, low, high, dilation, input_dilation, groups, flip = a
    return F["conv_general"](
        *i, stride=tuple(stride), padding=(tuple(low), tuple(high)),
        kernel_dilation=tuple(dilation), input_dilation=tuple(input_dilation), groups=groups,
        flip=flip,
    )  # fmt: skip


def _slices(start: Sequence[int], stop: Sequence[int], steps: Sequence[int]) -> tuple[slice, ...]:
    """Python's slices for MLX's, in which a negative step may end before the first element."""
    return tuple(
        slice(b, None if t < 0 and e < 0 else e, None if t == 1 else t)
        for b, e, t in zip(start, stop, steps, strict=True)
    )


def _slice_update(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    kind, start, stop, steps = a
    return F[UPDATES[kind]](i[0], _slices(start, stop, steps), i[1])


def _axes_first(x: Any, axes: Sequence[int]) -> tuple[Any, list[int]]:
    """x with `axes` moved to the front, and the permutation that did it."""
    order = [*axes, *(d for d in range(x.ndim) if d not in axes)]
    return (x if order == list(range(x.ndim)) else F["transpose"](x, tuple(order))), order


def _gather(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    x, *indices = i
    axes, sizes = a
    front, order = _axes_first(x, axes)
    rest = order[len(axes) :]
    cut = tuple(slice(0, sizes[d]) for d in rest)
    if any(sizes[d] != x.shape[d] for d in rest):
        front = F["getitem"](front, (*(slice(None) for _ in axes), *cut))
    picked = F["take"](front, indices[0], 0) if len(axes) == 1 else front[tuple(indices)]
    # The result has the shape of the indices, then one axis of x each, of size 1 where indexed.
    return F["reshape"](_restore(picked, indices[0].ndim, rest, sizes), o[0].shape)


def _restore(picked: Any, lead: int, rest: Sequence[int], sizes: Sequence[int]) -> Any:
    """Put the axes that were not indexed back in their order."""
    order = sorted(range(len(rest)), key=lambda k: rest[k])
    permuted = [*range(lead), *(lead + k for k in order)]
    return (
        picked if permuted == list(range(picked.ndim)) else F["transpose"](picked, tuple(permuted))
    )


def _scatter(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    kind, axes = a
    x, *indices, updates = i
    front, order = _axes_first(x, axes)
    lead = indices[0].ndim
    rest = order[len(axes) :]
    # Updates have the shape of the indices, then one axis of x each, of size 1 where indexed.
    kept = [updates.shape[lead + d] for d in rest]
    moved = F["transpose"](updates, (*range(lead), *(lead + d for d in order)))
    values = F["reshape"](moved, (*updates.shape[:lead], *kept))
    cut = tuple(slice(0, size) for size in kept)
    place = (*indices, *cut) if any(
        size != x.shape[d] for size, d in zip(kept, rest, strict=True)
    ) else tuple(indices)  # fmt: skip
    result = F[UPDATES[kind]](front, place if len(place) > 1 else place[0], values)
    if order == list(range(x.ndim)):
        return result
    back = sorted(range(x.ndim), key=lambda k: order[k])
    return F["transpose"](result, tuple(back))


def _scatter_axis(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    kind, axis = a
    x, index, values = i
    if kind == 1:
        return F["put_along_axis"](x, index, values, axis)
    grid = []
    for d, size in enumerate(index.shape):
        shape = [1] * index.ndim
        shape[d] = size
        grid.append(index if d == axis % x.ndim else F["reshape"](F["arange"](size), tuple(shape)))
    return F["at_add"](x, tuple(grid), values)


def _pad(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    axes, low, high = a
    widths = [(0, 0)] * i[0].ndim
    for axis, before, after in zip(axes, low, high, strict=True):
        widths[axis] = (before, after)
    return F["pad"](i[0], tuple(widths), constant_values=i[1])


def _fft(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    axes, inverse, real = a[:3]
    if real and inverse:
        return F["fft.irfftn"](i[0], tuple(o[0].shape[d] for d in axes), tuple(axes))
    name = "fft.rfftn" if real else "fft.ifftn" if inverse else "fft.fftn"
    return F[name](i[0], None, tuple(axes))


def _random_bits(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    count = o[0].size
    if o[0].dtype != mx.uint32 or count % 2:
        raise NotImplementedError("random bits of an odd count, or of 8 or 16 bits")
    return F["reshape"](F["random.split"](i[0], count // 2), o[0].shape)


def _settings(a: Sequence[Any]) -> dict[str, Any]:
    return {"group_size": a[0], "bits": a[1], "mode": MODES[a[2]]}


def _quantize(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    if a[3]:
        return F["dequantize"](*i, **_settings(a), dtype=o[0].dtype)
    return F["quantize"](*i, **_settings(a))


def _sorted_side(a: Sequence[Any], i: Sequence[Any]) -> dict[str, Any]:
    """Indices of a gathered product: MLX keeps the flag only where one side alone is given."""
    left, right = a[-2:]
    if right:
        return {"rhs_indices": i[-1], "sorted_indices": True}
    if left:
        return {"lhs_indices": i[-2], "sorted_indices": True}
    return {"lhs_indices": i[-2], "rhs_indices": i[-1]}


def _attention(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    scale, causal, has_sinks = a[:3]
    q, k, v, *rest = i
    sinks = rest.pop() if has_sinks else None
    mask = "causal" if causal else rest[0] if rest else None
    extra = {"sinks": sinks} if has_sinks else {}
    name = "fast.scaled_dot_product_attention"
    return F[name](q, k, v, scale=scale, mask=mask, **extra)


def _optional(weight: Any) -> Any:
    """Norms without a weight are handed over with a number in its place."""
    return None if weight.ndim == 0 else weight


def _rope(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    dims, traditional, base, scale = a[:4]
    freqs = i[2] if len(i) > 2 else None
    return F["fast.rope"](
        i[0], dims, traditional=traditional, base=None if freqs is not None else base, scale=scale,
        offset=i[1], freqs=freqs,
    )  # fmt: skip


PRIMITIVES: dict[str, Entry] = {
    **{primitive: _each(name) for primitive, name in ELEMENTWISE.items()},
    "AddMM": lambda i, a, o: F["addmm"](i[2], i[0], i[1], alpha=a[0], beta=a[1]),
    "Arange": _arange,
    "ArgPartition": lambda i, a, o: F["argpartition"](i[0], a[0], a[1]),
    "ArgReduce": lambda i, a, o: F[("argmin", "argmax")[a[0]]](i[0], a[1], True),
    "ArgSort": lambda i, a, o: F["argsort"](i[0], a[0]),
    "AsStrided": lambda i, a, o: F["as_strided"](i[0], tuple(a[0]), tuple(a[1]), a[2]),
    "AsType": lambda i, a, o: i[0] if i[0].dtype == a[0] else F["astype"](i[0], a[0]),
    "BitwiseBinary": lambda i, a, o: F[BITWISE[a[0]]](*i),
    "Broadcast": _broadcast,
    "BroadcastAxes": _broadcast,
    "Cholesky": lambda i, a, o: F["linalg.cholesky"](i[0], a[0], stream="cpu"),
    "Concatenate": lambda i, a, o: F["concatenate"](list(i), a[0]),
    "Convolution": _convolution,
    "Copy": lambda i, a, o: i[0],
    "DynamicSlice": lambda i, a, o: F["slice"](i[0], i[1], tuple(a[0]), tuple(a[1])),
    "DynamicSliceUpdate": lambda i, a, o: F["slice_update"](i[0], i[1], i[2], tuple(a[0])),
    "Equal": _equal,
    "ExpandDims": lambda i, a, o: F["expand_dims"](i[0], tuple(a[0])),
    "FFT": _fft,
    "Flatten": _reshape,
    "Full": lambda i, a, o: F["broadcast_to"](F["astype"](i[0], o[0].dtype), o[0].shape),
    "Gather": _gather,
    "GatherAxis": lambda i, a, o: F["take_along_axis"](i[0], i[1], a[0]),
    "GatherMM": lambda i, a, o: F["gather_mm"](i[0], i[1], **_sorted_side(a, i)),
    "GatherQMM": lambda i, a, o: F["gather_qmm"](
        *i[:-2], transpose=a[3], **_settings(a), **_sorted_side(a, i)
    ),
    "Hadamard": lambda i, a, o: F["hadamard_transform"](i[0], a[0]),
    "LayerNorm": lambda i, a, o: F["fast.layer_norm"](i[0], _optional(i[1]), _optional(i[2]), a[0]),
    "Log": lambda i, a, o: F[("log2", "log10", "log")[a[0]]](i[0]),
    "LogSumExp": lambda i, a, o: F["logsumexp"](i[0], -1, True),
    "Pad": _pad,
    "Partition": lambda i, a, o: F["partition"](i[0], a[0], a[1]),
    "Quantize": _quantize,
    "QuantizedMatmul": lambda i, a, o: F["quantized_matmul"](*i, transpose=a[3], **_settings(a)),
    "RMSNorm": lambda i, a, o: F["fast.rms_norm"](i[0], _optional(i[1]), a[0]),
    "RandomBits": _random_bits,
    "Reduce": lambda i, a, o: F[REDUCTIONS[a[0]]](i[0], tuple(a[1]), True),
    "Reshape": _reshape,
    "RoPE": _rope,
    "Scan": lambda i, a, o: F[SCANS[a[0]]](i[0], a[1], reverse=a[2], inclusive=a[3]),
    "ScaledDotProductAttention": _attention,
    "Scatter": _scatter,
    "ScatterAxis": _scatter_axis,
    "SearchSorted": lambda i, a, o: F["searchsorted"](i[0], i[1], side="right" if a[0] else "left"),
    "Slice": lambda i, a, o: F["getitem"](i[0], _slices(*a)),
    "SliceUpdate": _slice_update,
    "Softmax": lambda i, a, o: F["softmax"](i[0], -1, precise=bool(a[0])),
    "Sort": lambda i, a, o: F["sort"](i[0], a[0]),
    "Split": lambda i, a, o: F["split"](i[0], tuple(a[0]), a[1]),
    "Sqrt": lambda i, a, o: F["rsqrt" if a[0] else "sqrt"](i[0]),
    "Squeeze": lambda i, a, o: F["squeeze"](i[0], tuple(a[0])),
    "Transpose": lambda i, a, o: F["transpose"](i[0], tuple(a[0])),
    "Unflatten": _reshape,
    "View": lambda i, a, o: F["view"](i[0], a[0]),
}
