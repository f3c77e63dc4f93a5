"""Rules of ops that treat elements, or rows, apart."""

from __future__ import annotations

from collections.abc import Callable

from ...ir.graph import Node, Value
from ...ir.ops import OPS, setting
from .spec import Dim, Spec, from_right, no_axes, of_sizes, own_axes

Rule = Callable[[Node], Spec | None]

_SUMS = frozenset({"add", "subtract"})
_LINEAR = frozenset(
    {"negative", "astype", "positive", "stop_gradient", "real", "imag", "conjugate"}
)


def pointwise(node: Node) -> Spec:
    """Axes are aligned from the right, as broadcasting does."""
    operands = [from_right(v) for v in node.inputs]
    results = [from_right(v) for v in node.outputs]
    partial = "no"
    if node.op in _SUMS:
        partial = "all"
    elif node.op == "multiply":
        partial = "each"
    elif node.op == "divide" or node.op in _LINEAR:
        partial = "first"
    return of_sizes(operands, results, node, partial=partial, pointwise=True)


def _along(names: tuple[str, ...]) -> Rule:
    """Ops that treat an axis of their first operand whole, named by an argument."""

    def rule(node: Node) -> Spec | None:
        (a, *rest) = node.inputs
        axes = _axes(node, names[0], a)
        if any(v.shape and v.ndim != a.ndim for v in node.outputs) or rest:
            return None
        operands = [own_axes(a, axes)]
        return of_sizes(operands, [own_axes(v, axes) for v in node.outputs], node)

    return rule


def _axes(node: Node, name: str, a: Value) -> tuple[int, ...]:
    axis = setting(node, name)
    if axis is None:
        return tuple(range(a.ndim))
    return tuple(axis) if isinstance(axis, tuple) else (axis,)


def reduction(node: Node) -> Spec | None:
    """A sum over a split axis gives partial sums."""
    if len(node.inputs) != 1:
        return None
    a, out = node.inputs[0], node.output
    gone = {axis % a.ndim for axis in _axes(node, "axis", a)} if a.ndim else set()
    kept = [axis for axis in range(a.ndim) if axis not in gone]
    labels = own_axes(a)
    if setting(node, "keepdims"):
        result = own_axes(out, tuple(gone))
    else:
        result = tuple(labels[axis] for axis in kept)
    partial = "first" if node.op in ("sum", "mean") else "no"
    over = "sums" if node.op == "sum" else "whole"
    return of_sizes([labels], [result], node, partial=partial, **{over: frozenset(gone)})


def normalization(node: Node) -> Spec:
    """The last axis is whole; scales and biases lie along it."""
    x, *rest = node.inputs
    axes, last = own_axes(x), x.ndim - 1
    along = [(Dim(last),) if v.ndim == 1 else no_axes(v) for v in rest]
    return of_sizes([axes, *along], [axes], node, whole=frozenset({last}))


_WITH_AXIS = (
    "softmax", "cummax", "cummin", "cumprod", "cumsum", "logcumsumexp", "sort", "argsort",
    "argpartition", "partition", "topk", "flip",
)  # fmt: skip
_REDUCTIONS = (
    "all", "any", "argmax", "argmin", "logsumexp", "max", "mean", "min", "prod", "std", "sum",
    "var",
)  # fmt: skip
_LEFT_OUT = frozenset({"view", "from_fp8", "to_fp8"})

RULES: dict[str, Rule] = {
    **{
        name: pointwise
        for name, op in OPS.items()
        if op.kind in ("elementwise", "elementwise with settings") and name not in _LEFT_OUT
    },
    **{name: _along(("axis",)) for name in _WITH_AXIS},
    **{name: reduction for name in _REDUCTIONS},
    "fast.rms_norm": normalization,
    "fast.layer_norm": normalization,
}
