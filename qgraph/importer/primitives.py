"""MLX's primitives, as `mx.export_function` hands them over, in terms of ops of the table.

An entry takes the inputs (tensors), the arguments of the primitive's state and the types of its
outputs, and gives a tensor or a list.  What arguments mean is in MLX's `primitives.h`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..tracing.functions import FUNCTIONS as F
from ..tracing.tensor import as_tensor
from ..types import TensorType
from .indexing import cut, gather, masked_scatter, scatter, scatter_axis, slice_update
from .random_bits import random_bits
from .whole import (
    attention,
    gather_qmm,
    layer_norm,
    layer_norm_gradient,
    quantize,
    quantized_matmul,
    rms_norm,
    rms_norm_gradient,
    rope,
    sorted_side,
)

Entry = Callable[[Sequence[Any], Sequence[Any], Sequence[TensorType]], Any]

REDUCTIONS = ("all", "any", "sum", "prod", "min", "max")
SCANS = ("cummax", "cummin", "cumsum", "cumprod", "logcumsumexp")
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


def _number_of_elements(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """Shapes belong to a graph, so this is a constant in it."""
    axes, inverted, dtype = a
    count = math.prod(i[0].shape[axis] for axis in axes)
    return as_tensor(mx.array(1.0 / count if inverted else count, dtype))


def _block_masked(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    x, y, *masks = i
    out = masks[0] if len(masks) != 2 else None
    lhs, rhs = masks[-2:] if len(masks) > 1 else (None, None)
    return F["block_masked_mm"](x, y, a[0], out, lhs, rhs)


def _eigen(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    return F["linalg.eig" if a[0] else "linalg.eigvals"](i[0], stream="cpu")


def _eigen_hermitian(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    return F["linalg.eigh" if a[1] else "linalg.eigvalsh"](i[0], a[0], stream="cpu")


def _inverse(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    triangular, upper = a
    if triangular:
        return F["linalg.tri_inv"](i[0], upper, stream="cpu")
    return F["linalg.inv"](i[0], stream="cpu")


PRIMITIVES: dict[str, Entry] = {
    **{primitive: _each(name) for primitive, name in ELEMENTWISE.items()},
    # Of complex numbers MLX's primitive gives complex ones, which `mx.abs` then casts.
    "Abs": lambda i, a, o: F["astype"](F["abs"](i[0]), o[0].dtype),
    "AddMM": lambda i, a, o: F["addmm"](i[2], i[0], i[1], alpha=a[0], beta=a[1]),
    "Arange": _arange,
    "ArgPartition": lambda i, a, o: F["argpartition"](i[0], a[0], a[1]),
    "ArgReduce": lambda i, a, o: F[("argmin", "argmax")[a[0]]](i[0], a[1], True),
    "ArgSort": lambda i, a, o: F["argsort"](i[0], a[0]),
    "AsStrided": lambda i, a, o: F["as_strided"](i[0], tuple(a[0]), tuple(a[1]), a[2]),
    "AsType": lambda i, a, o: i[0] if i[0].dtype == a[0] else F["astype"](i[0], a[0]),
    "BitwiseBinary": lambda i, a, o: F[BITWISE[a[0]]](*i),
    "BlockMaskedMM": _block_masked,
    "Broadcast": _broadcast,
    "BroadcastAxes": _broadcast,
    "Cholesky": lambda i, a, o: F["linalg.cholesky"](i[0], a[0], stream="cpu"),
    "Concatenate": lambda i, a, o: F["concatenate"](list(i), a[0]),
    "Convolution": _convolution,
    "Copy": lambda i, a, o: i[0],
    "Depends": lambda i, a, o: list(i[: len(o)]),
    "DynamicSlice": lambda i, a, o: F["slice"](i[0], i[1], tuple(a[0]), tuple(a[1])),
    "DynamicSliceUpdate": lambda i, a, o: F["slice_update"](i[0], i[1], i[2], tuple(a[0])),
    "Eig": _eigen,
    "Eigh": _eigen_hermitian,
    "Equal": _equal,
    "ExpandDims": lambda i, a, o: F["expand_dims"](i[0], tuple(a[0])),
    "FFT": _fft,
    "Flatten": _reshape,
    "Full": lambda i, a, o: F["broadcast_to"](F["astype"](i[0], o[0].dtype), o[0].shape),
    "Gather": gather,
    "GatherAxis": lambda i, a, o: F["take_along_axis"](i[0], i[1], a[0]),
    "GatherMM": lambda i, a, o: F["gather_mm"](i[0], i[1], **sorted_side(a, i)),
    "GatherQMM": gather_qmm,
    "Hadamard": lambda i, a, o: F["hadamard_transform"](i[0], a[0]),
    "Inverse": _inverse,
    "LayerNorm": layer_norm,
    "LayerNormVJP": layer_norm_gradient,
    "Log": lambda i, a, o: F[("log2", "log10", "log")[a[0]]](i[0]),
    "LogSumExp": lambda i, a, o: F["logsumexp"](i[0], -1, True),
    "MaskedScatter": masked_scatter,
    "NumberOfElements": _number_of_elements,
    "Pad": _pad,
    "Partition": lambda i, a, o: F["partition"](i[0], a[0], a[1]),
    "QRF": lambda i, a, o: F["linalg.qr"](i[0], stream="cpu"),
    "Quantize": quantize,
    "QuantizedMatmul": quantized_matmul,
    "RMSNorm": rms_norm,
    "RMSNormVJP": rms_norm_gradient,
    "RandomBits": random_bits,
    "Reduce": lambda i, a, o: F[REDUCTIONS[a[0]]](i[0], tuple(a[1]), True),
    "Reshape": _reshape,
    "RoPE": rope,
    "SVD": lambda i, a, o: F["linalg.svd"](i[0], a[0], stream="cpu"),
    "Scan": lambda i, a, o: F[SCANS[a[0]]](i[0], a[1], reverse=a[2], inclusive=a[3]),
    "ScaledDotProductAttention": attention,
    "Scatter": scatter,
    "ScatterAxis": scatter_axis,
    "SearchSorted": lambda i, a, o: F["searchsorted"](i[0], i[1], side="right" if a[0] else "left"),
    "Slice": cut,
    "SliceUpdate": slice_update,
    "Softmax": lambda i, a, o: F["softmax"](i[0], -1, precise=bool(a[0])),
    "Sort": lambda i, a, o: F["sort"](i[0], a[0]),
    "Split": lambda i, a, o: F["split"](i[0], tuple(a[0]), a[1]),
    "Sqrt": lambda i, a, o: F["rsqrt" if a[0] else "sqrt"](i[0]),
    "Squeeze": lambda i, a, o: F["squeeze"](i[0], tuple(a[0])),
    "Transpose": lambda i, a, o: F["transpose"](i[0], tuple(a[0])),
    "Unflatten": _reshape,
    "View": lambda i, a, o: F["view"](i[0], a[0]),
}
