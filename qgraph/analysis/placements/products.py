"""Rules of products, dense and quantized, of convolutions, and of packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...ir.graph import Node, Value
from ...ir.ops import setting
from ...types import TensorType
from .spec import Dim, Dims, Spec, common_unit, from_right, no_axes, of_sizes

Rule = Callable[[Node], Spec | None]


def _batch(value: Value) -> Dims:
    """Axes before the last two, aligned from the right as broadcasting does."""
    return from_right(value)[:-2] if value.ndim > 2 else ()


def matmul(node: Node) -> Spec | None:
    """(…, M, K) by (…, K, N): split along N or the batch, or along K into partial sums."""
    a, b = node.operand("a"), node.operand("b")
    if a.ndim < 2 or b.ndim < 2:
        return None
    n = Dim("n", common_unit(b.shape[-1]))
    out: Dims = (*_batch(node.output), Dim("m"), n)
    dims = {"a": (*_batch(a), Dim("m"), Dim("k")), "b": (*_batch(b), Dim("k"), n)}
    operands: list[Dims] = [dims["a"], dims["b"]]
    sums = frozenset({"k"})
    if node.op == "matmul":
        return of_sizes(operands, [out], node, sums=sums, partial="each")
    c = node.operand("c")
    added = tuple(out[axis - c.ndim] for axis in range(c.ndim))
    return of_sizes([added, *operands], [out], node, sums=sums, added=frozenset({0}))


def _packed(node: Node, w: Value) -> tuple[Dims, Dims, int]:
    """Axes of a packed weight and of its scales, and the elements of K in a unit."""
    group = setting(node, "group_size") or _DEFAULT_GROUPS[setting(node, "mode")]
    bits = setting(node, "bits") or _DEFAULT_BITS[setting(node, "mode")]
    words = group * bits // 32
    rows = common_unit(w.shape[-2])
    if setting(node, "transpose") if node.op in _WITH_TRANSPOSE else True:
        return (Dim("n", rows), Dim("k", words)), (Dim("n", rows), Dim("k", 1)), group
    return (Dim("k", 1), Dim("n", words)), (Dim("k", 1), Dim("n", 1)), group


_WITH_TRANSPOSE = frozenset({"quantized_matmul", "gather_qmm"})
_DEFAULT_GROUPS = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
_DEFAULT_BITS = {"affine": 4, "mxfp4": 4, "mxfp8": 8, "nvfp4": 4}


def quantized_matmul(node: Node) -> Spec | None:
    """Split along the weight's rows, or along whole groups of its columns into partial sums."""
    x, w = node.operand("x"), node.operand("w")
    if w.ndim != 2 or x.ndim < 1:
        return None
    packed, scales, group = _packed(node, w)
    transposed = setting(node, "transpose")
    k = Dim("k", group if transposed else 1)
    n = packed[0] if transposed else Dim("n", group)
    rows = from_right(x)[:-1]
    operands: list[Dims] = [(*rows, k)]
    operands += [packed] + [scales] * (len(node.inputs) - 2)
    return of_sizes(
        operands, [(*rows, n)], node, sums=frozenset({"k"}), partial="first", pointwise=False
    )


def quantize(node: Node) -> Spec | None:
    """Rows apart, columns in whole groups; leading axes, of experts or layers, apart too."""
    if len(node.inputs) > 1:
        return None
    w = node.inputs[0]
    packed, scales, group = _packed(node, w)
    lead = from_right(w)[:-2]
    results: list[Dims] = [(*lead, *packed)] + [(*lead, *scales)] * (len(node.outputs) - 1)
    return of_sizes([(*lead, packed[0], Dim("k", group))], results, node)


def dequantize(node: Node) -> Spec | None:
    if node.args.get("global_scale") is not None:
        return None
    w = node.operand("w")
    packed, scales, group = _packed(node, w)
    # Rows that were picked from a table by index may be alone, so they bear no unit.
    rows = (*(from_right(w)[:-2]), Dim("n")) if w.ndim > 1 else ()
    operands: list[Dims] = [(*rows, packed[1])] + [(*rows, scales[1])] * (len(node.inputs) - 1)
    return of_sizes(operands, [(*rows, Dim("k", group))], node, pointwise=True)


def gather(node: Node) -> Spec | None:
    """A product with a matrix an index picks: inside the matrices, or by whole matrices."""
    dense = node.op == "gather_mm"
    x, w = (
        (node.operand("a"), node.operand("b")) if dense else (node.operand("x"), node.operand("w"))
    )
    if w.ndim != 3 or x.ndim < 2 or node.args.get("global_scale") is not None:
        return None
    if dense:
        n: Dim | None = Dim("n", common_unit(w.shape[-1]))
        k = Dim("k")
        weights: list[Dims] = [(None, k, n)]
    else:
        packed, scales, group = _packed(node, w)
        transposed = setting(node, "transpose")
        k = Dim("k", group if transposed else 1)
        n = packed[0] if transposed else Dim("n", group)
        weights = [(None, *packed)] + [(None, *scales)] * (
            sum(node.value(p) is not None for p in ("scales", "biases"))
        )
    indices = [v for name in ("lhs_indices", "rhs_indices") if (v := node.value(name)) is not None]
    operands: list[Dims] = [(*no_axes(x)[:-1], k), *weights, *map(no_axes, indices)]
    table = None
    if node.value("rhs_indices") is not None:
        table = (1, len(node.inputs) - 1)
    return of_sizes(
        operands, [(*no_axes(node.output)[:-1], n)], node, sums=frozenset({"k"}),
        partial="first", table=table,
    )  # fmt: skip


def einsum(node: Node) -> Spec | None:
    """Each letter is a label; those that the result lacks are summed over."""
    words = str(node.args["subscripts"]).replace(" ", "")
    if "." in words or "->" not in words:
        return None
    left, right = words.split("->")
    terms = left.split(",")
    if any(len(set(t)) != len(t) for t in terms):
        return None
    operands: list[Dims] = [tuple(map(Dim, t)) for t in terms]
    sums = frozenset(set(left) - set(right) - {","})
    partial = "each" if len(terms) > 1 else "first"
    return of_sizes(operands, [tuple(map(Dim, right))], node, sums=sums, partial=partial)


def convolution(node: Node) -> Spec | None:
    """Split along output channels, images, groups, or input channels into partial sums."""
    x, w = node.inputs
    between = x.ndim - 2
    groups = setting(node, "groups")
    space = (None,) * between
    if groups == 1:
        o = Dim("o", common_unit(w.shape[0]))
        operands: list[Dims] = [(Dim("b"), *space, Dim("c")), (o, *space, Dim("c"))]
        out: Dims = (Dim("b"), *space, o)
        return of_sizes(operands, [out], node, sums=frozenset({"c"}), partial="each")
    g = Dim("g", x.shape[-1] // groups), Dim("g", w.shape[0] // groups)
    operands = [(Dim("b"), *space, g[0]), (g[1], *space, None)]
    return of_sizes(operands, [(Dim("b"), *space, g[1])], node, local_args=_groups)


def _groups(
    node: Node, operands: Sequence[TensorType], results: Sequence[TensorType]
) -> Mapping[str, Any]:
    return {"groups": operands[0].shape[-1] // operands[1].shape[-1]}


RULES: dict[str, Rule] = {
    "matmul": matmul,
    "addmm": matmul,
    "quantized_matmul": quantized_matmul,
    "quantize": quantize,
    "dequantize": dequantize,
    "gather_mm": gather,
    "gather_qmm": gather,
    "einsum": einsum,
    "conv1d": convolution,
    "conv2d": convolution,
    "conv3d": convolution,
}
