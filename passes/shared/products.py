"""What passes ask of quantized products: their parts, and whether they may take another form."""

from __future__ import annotations

from collections.abc import Collection

from qgraph.ir.graph import Node, Value
from qgraph.tracing.tensor import Tensor

QUANTIZED = frozenset({"quantized_matmul", "gather_qmm"})
PARTS = ("w", "scales", "biases")
INDICES = ("lhs_indices", "rhs_indices")


def parts_of(node: Node) -> tuple[Tensor, ...]:
    """The packed parts that a `dequantize` or a quantized product reads.

    >>> import qgraph as qg
    >>> w = qg.spec((8, 64))
    >>> graph = qg.trace(lambda x, w: qg.quantized_matmul(x, w), qg.spec((1, 64)), w)
    >>> [str(part.dtype) for part in parts_of(graph.nodes[-1])]
    ['mlx.core.uint32', 'mlx.core.float32', 'mlx.core.float32']
    """
    return tuple(Tensor(v) for name in PARTS if (v := node.value(name)) is not None)


def indices_of(node: Node) -> dict[str, Tensor]:
    """The indices that a `gather_mm` or `gather_qmm` is given, by parameter."""
    return {name: Tensor(v) for name in INDICES if (v := node.value(name)) is not None}


def is_open(node: Node, fixed: Collection[Value]) -> bool:
    """Is it a quantized product by one weight, or by one for each expert, that may change form?

    What it makes of the weight is then computed once: the weight is among the values `fixed`, which
    no call changes.  The user has chosen no stream for it, and no pass a kernel.
    """
    return (
        node.op in QUANTIZED
        and node.stream is None
        and not node.kernel
        and node.operand("w").ndim == (3 if node.op == "gather_qmm" else 2)
        and all(part.value in fixed for part in parts_of(node))
    )
