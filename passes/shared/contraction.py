"""Products in all their spellings as one form: x times a weight on the right.

`matmul`, `addmm`, and `inner`, `tensordot` and `einsum` of two operands are `finish(x @ weight)`
for a suitable x, weight and finish, with either operand as the weight.  Axes that are summed
together become one, and so do those that only the weight has; whether groups then still run whole
is for `weight_view` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from string import ascii_letters, ascii_lowercase

from qgraph.ir.graph import Node
from qgraph.ir.ops import setting
from qgraph.tracing.tensor import Tensor, apply


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
    elif (spelt := as_einsum(node)) is not None:
        a, b, left, right, result = spelt
        if (reading := _einsum(a, b, left, right, result)) is not None:
            yield reading
        if (reading := _einsum(b, a, right, left, result)) is not None:
            yield replace(reading, on_left=True)


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


def as_einsum(node: Node) -> tuple[Tensor, Tensor, str, str, str] | None:
    """The operands of a product of two, and the letters of their axes and of the result's.

    >>> import qgraph as qg
    >>> graph = qg.trace(qg.inner, qg.spec((2, 8)), qg.spec((4, 8)))
    >>> as_einsum(graph.nodes[-1])[2:]
    ('ac', 'bc', 'ab')
    """
    if node.op == "einsum":
        return _from_einsum(node)
    if node.op not in ("inner", "tensordot"):
        return None
    a, b = Tensor(node.operand("a")), Tensor(node.operand("b"))
    axes = setting(node, "axes") if node.op == "tensordot" else ((-1,), (-1,))
    if isinstance(axes, int):
        axes = (range(a.ndim - axes, a.ndim), range(axes))
    summed = [[axis % x.ndim for axis in ((s,) if isinstance(s, int) else s)]
              for s, x in zip(axes, (a, b), strict=True) if x.ndim]  # fmt: skip
    if len(summed) < 2:
        return None
    names = iter(ascii_lowercase)
    kept = [{i: next(names) for i in range(x.ndim) if i not in s}
            for x, s in zip((a, b), summed, strict=True)]  # fmt: skip
    both = [next(names) for _ in summed[0]]
    left, right = (
        "".join({**rest, **dict(zip(s, both, strict=True))}[i] for i in range(x.ndim))
        for x, s, rest in zip((a, b), summed, kept, strict=True)
    )
    return a, b, left, right, "".join([*kept[0].values(), *kept[1].values()])


def _from_einsum(node: Node) -> tuple[Tensor, Tensor, str, str, str] | None:
    terms, arrow, result = node.args["subscripts"].replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    if len(node.args["operands"]) != 2:
        return None
    a, b = map(Tensor, node.args["operands"])
    if not arrow:
        once = sorted(c for c in set(terms) - set(",.") if terms.count(c) == 1)
        result = "..." * ("..." in terms) + "".join(once)
    rest = "".join(c for c in ascii_letters if c not in terms)
    hidden = [x.ndim - len(t) + 3 for x, t in ((a, left), (b, right)) if "..." in t]
    spread = rest[: max(hidden, default=0)]
    if any(count != len(spread) for count in hidden):
        return None
    return a, b, *(t.replace("...", spread) for t in (left, right, result))


def _einsum(x: Tensor, weight: Tensor, left: str, right: str, result: str) -> Contraction | None:
    """Read a sum of products as x @ weight: axes of one kind become one."""
    letters = set(left + right)
    if len(set(left)) < len(left) or len(set(right)) < len(right):
        return None
    batch = [c for c in right if c in left and c in result]
    summed = [c for c in right if c in left and c not in result]
    rows = [c for c in left if c not in right]
    columns = [c for c in right if c not in left]
    if not summed or not columns or set(result) != letters - set(summed):
        return None
    size = {**dict(zip(right, weight.shape, strict=True)), **dict(zip(left, x.shape, strict=True))}
    if any(size[c] != n for c, n in zip(right, weight.shape, strict=True)):
        return None
    outer = [size[c] for c in batch]
    rows_shape = [prod(size[c] for c in rows)] if batch else [size[c] for c in rows]
    depth, width = (prod(size[c] for c in kind) for kind in (summed, columns))
    seen = _arranged(x, left, [*batch, *rows, *summed], [*outer, *rows_shape, depth])
    packed = _arranged(weight, right, [*batch, *summed, *columns], [*outer, depth, width])
    made = [*batch, *rows, *columns]

    def finish(y: Tensor) -> Tensor:
        y = _reshaped(y, [size[c] for c in made])
        return _permuted(y, [made.index(c) for c in result])

    return Contraction(seen, packed, finish, 3)


def _arranged(x: Tensor, letters: str, order: list[str], shape: list[int]) -> Tensor:
    return _reshaped(_permuted(x, [letters.index(c) for c in order]), shape)


def _reshaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    if x.shape == tuple(shape):
        return x
    result: Tensor = apply("reshape", (x, tuple(shape)))
    return result


def _permuted(x: Tensor, axes: Sequence[int]) -> Tensor:
    if list(axes) == list(range(x.ndim)):
        return x
    result: Tensor = apply("transpose", (x, tuple(axes)))
    return result
