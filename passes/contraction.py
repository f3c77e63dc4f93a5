"""Products in all their spellings as one form: x times a weight on the right.

`matmul`, `addmm`, `inner`, `tensordot` and `einsum` that sum one axis are `finish(x @ weight)`
for a suitable x, weight and finish, with either operand as the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from qgraph.ir import Node
from qgraph.rewrite import setting
from qgraph.tensor import Tensor, apply


@dataclass(frozen=True, slots=True)
class Contraction:
    """`finish(x @ weight)`, with the sum over the last axis of x and the next to last of weight.

    `case` is the number under which `fuse-quantized-matmul` lists this spelling; `on_left` says
    that the weight is what stood on the left.
    """

    x: Tensor
    weight: Tensor
    finish: Callable[[Tensor], Tensor]
    case: int
    on_left: bool = False


def as_contraction(node: Node) -> Iterator[Contraction]:
    """The ways to read `node` as a product with a weight: on the right first, then on the left."""
    if node.op == "matmul":
        a, b = Tensor(node.operand("a")), Tensor(node.operand("b"))
        yield from _matmul(a, b, node.output.shape, 1)
    elif node.op == "addmm":
        yield from _addmm(node)
    elif node.op == "inner":
        a, b = Tensor(node.operand("a")), Tensor(node.operand("b"))
        if a.ndim and b.ndim:
            yield from _one_axis(a, b, a.ndim - 1, b.ndim - 1)
    elif node.op == "tensordot":
        yield from _tensordot(node)
    elif node.op == "einsum":
        yield from _einsum(node)


def _swap(x: Tensor) -> Tensor:
    result: Tensor = apply("swapaxes", (x, -1, -2))
    return result


def _matmul(a: Tensor, b: Tensor, shape: tuple[int, ...], case: int) -> Iterator[Contraction]:
    def fit(y: Tensor) -> Tensor:
        """Batches that only the weight has are broadcast."""
        result: Tensor = y if y.shape == shape else apply("broadcast_to", (y, shape))
        return result

    if b.ndim >= 2:
        yield Contraction(a, b, fit, case)
    if a.ndim >= 2:
        if b.ndim == 1:
            yield Contraction(b, _swap(a), fit, 4, True)
        else:
            yield Contraction(_swap(b), _swap(a), lambda y: fit(_swap(y)), 4, True)


def _addmm(node: Node) -> Iterator[Contraction]:
    c = Tensor(node.operand("c"))
    alpha, beta = setting(node, "alpha"), setting(node, "beta")
    a, b = Tensor(node.operand("a")), Tensor(node.operand("b"))

    def add(y: Tensor) -> Tensor:
        return (y if alpha == 1 else y * alpha) + (c if beta == 1 else c * beta)

    for product in _matmul(a, b, node.output.shape, 3):
        yield replace(product, finish=_then(product.finish, add), case=3)


def _then(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda y: second(first(y))


def _permuted(x: Tensor, axes: Sequence[int]) -> Tensor:
    if list(axes) == list(range(x.ndim)):
        return x
    result: Tensor = apply("transpose", (x, tuple(axes)))
    return result


def _one_axis(a: Tensor, b: Tensor, axis_a: int, axis_b: int) -> Iterator[Contraction]:
    """Sum one axis of each; the result has the other axes of a, then those of b."""
    if b.ndim == 2:
        x = _permuted(a, [i for i in range(a.ndim) if i != axis_a] + [axis_a])
        yield Contraction(x, _permuted(b, [axis_b, 1 - axis_b]), lambda y: y, 3)
    if a.ndim == 2:
        x = _permuted(b, [i for i in range(b.ndim) if i != axis_b] + [axis_b])
        last_first = [b.ndim - 1, *range(b.ndim - 1)]
        weight = _permuted(a, [axis_a, 1 - axis_a])
        yield Contraction(x, weight, lambda y: _permuted(y, last_first), 3, True)


def _tensordot(node: Node) -> Iterator[Contraction]:
    a, b = Tensor(node.operand("a")), Tensor(node.operand("b"))
    axes = setting(node, "axes")
    if isinstance(axes, int):
        axes = (tuple(range(a.ndim - axes, a.ndim)), tuple(range(axes)))
    first, second = (((s,) if isinstance(s, int) else tuple(s)) for s in axes)
    if len(first) == 1 and len(second) == 1:
        yield from _one_axis(a, b, first[0] % a.ndim, second[0] % b.ndim)


def _einsum(node: Node) -> Iterator[Contraction]:
    operands = node.args["operands"]
    terms, _, result = node.args["subscripts"].replace(" ", "").partition("->")
    left, comma, right = terms.partition(",")
    if len(operands) != 2 or not comma or "." in terms:
        return
    if "->" not in node.args["subscripts"]:
        result = "".join(sorted(c for c in set(left + right) if (left + right).count(c) == 1))
    shared = set(left) & set(right)
    once = len(set(left)) == len(left) and len(set(right)) == len(right)
    if len(shared) != 1 or shared & set(result) or not once:
        return
    if set(result) != (set(left) | set(right)) - shared:
        return
    axis = shared.pop()
    a, b = Tensor(operands[0]), Tensor(operands[1])
    made = left.replace(axis, "") + right.replace(axis, "")
    order = [made.index(letter) for letter in result]
    for product in _one_axis(a, b, left.index(axis), right.index(axis)):
        yield replace(product, finish=_then(product.finish, lambda y: _permuted(y, order)))
