"""Sums over two GPUs that each rank pushes to the other, with the residual and the norm after them.

A prompt's sums are bound by the link, and what comes after them by memory: adding the residual and
the norm each read and write all rows again.  One launch does all three (`kernels/cuda/pushed.cuh`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from ....ir.graph import Graph, Node
from ....kernels.cuda.kernel import CudaKernel, bounded
from ....kernels.cuda.source import cuda_source
from ....mesh import INBOX
from ....types import TensorType
from .expressions import FLOATS, TYPES, literal
from .peers import PARTS, Peers
from .residual import AddNorm

THREADS = 512
SUM = "distributed.all_sum"
_BLOCKS = 264
"""Two on each multiprocessor of an H100."""


def can_push(x: TensorType | mx.array, ranks: int) -> bool:
    """Is there a kernel for a sum of such numbers over so many ranks?

    >>> rows = TensorType((2048, 4096), mx.bfloat16)
    >>> can_push(rows, 2), can_push(rows, 4)
    (True, False)
    """
    return ranks == 2 and x.dtype in FLOATS and x.nbytes % 16 == 0 and 0 < x.nbytes <= INBOX


def sum_norm(graph: Graph, node: Node) -> AddNorm | None:
    """A sum over the ranks that is added to a residual and normed, if nothing else reads it; `x` is
    what is summed up."""
    users = graph.users.get(node.output, ())
    if node.op != SUM or len(users) != 1 or node.output in graph.outputs:
        return None
    found = AddNorm.at(graph, users[0])
    if found is None:
        return None
    residual = found.residual if found.x is node.output else found.x
    nodes = (node, *found.nodes)
    return found._replace(x=node.operand("x"), residual=residual, nodes=nodes)


class PushedRegion:
    """A region's body that is such a sum, ready to be launched as `GridRegion` is."""

    def __init__(self, found: AddNorm, body: Graph, peers: Peers) -> None:
        self._eps, self._peers = found.eps, peers
        self._at, self._results = found.places_in(body)

    @staticmethod
    def of(body: Graph, peers: Peers | None) -> PushedRegion | None:
        sums = [node for node in body.nodes if node.op == SUM]
        if len(sums) != 1 or len(body.nodes) != 3 or peers is None:
            return None
        found = sum_norm(body, sums[0])
        if found is None or not can_push(found.x.type, peers.ranks):
            return None
        return PushedRegion(found, body, peers)

    def __call__(
        self, inputs: Sequence[mx.array], counters: mx.array, last: mx.array
    ) -> tuple[list[mx.array], mx.array]:
        """As `GridRegion` is called."""
        x, residual, weight = (inputs[i] for i in self._at)
        *made, last = pushed(x, self._peers, last, residual, weight, self._eps)
        return [made[i] for i in self._results], last


def pushed(
    x: mx.array,
    peers: Peers,
    last: mx.array,
    residual: mx.array | None = None,
    weight: mx.array | None = None,
    eps: float = 0.0,
) -> list[mx.array]:
    """The sum, with the residual; its norm, if there is a weight; `last` for the next launch."""
    size = x.dtype.size
    width = THREADS * 16 // size if weight is None else x.shape[-1]
    rows = -(-x.size // width)
    chunks = -(-width * size // (THREADS * 16))
    given = [a for a in (residual, weight) if a is not None]
    norms = weight is not None
    kernel = _kernel(x.dtype, chunks, residual is not None, norms, width, eps)
    *made, last = kernel(
        inputs=[x.flatten(), *given, peers.places, last],
        grid=(min(rows, _BLOCKS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[*[x.shape] * (1 + norms), last.shape],
        output_dtypes=[*[x.dtype] * (1 + norms), last.dtype],
    )
    return [*made, last]


@cache
def _kernel(
    dtype: mx.Dtype, chunks: int, adds: bool, norms: bool, width: int, eps: float
) -> CudaKernel:
    type = TYPES[dtype]
    form = f"{type} {chunks} {adds} {norms} {width} {eps!r}"
    name = "qgraph_pushed_" + hashlib.sha1(form.encode()).hexdigest()[:12]
    inputs = ["x", *["residual"] * adds, *["weight"] * norms, "places", "last"]
    outputs = ["found", *["normed"] * norms, "done"]
    arguments = [f"const {type}* x", "const __grid_constant__ Shape x_shape"]
    arguments += [f"const {type}* {name}" for name in inputs[1:-2]]
    arguments += ["const uint64_t* places", "const uint32_t* last"]
    arguments += [f"{type}* {name}" for name in outputs[:-1]] + ["uint32_t* done"]
    declared = bounded(name, ", ".join(arguments), THREADS, 2 if chunks <= 2 else 1)
    residual, weight, normed = (
        each if there else "nullptr"
        for each, there in (("residual", adds), ("weight", norms), ("normed", norms))
    )
    return CudaKernel(
        name,
        inputs,
        outputs,
        f"""
            using namespace qgraph::phases;
            push_sum<{type}, {chunks}, {str(adds).lower()}, {str(norms).lower()}>(
                places, x, {residual}, {weight}, found, {normed}, x_shape[0], {width},
                {literal(eps)});
        """,
        header=cuda_source(*PARTS, "cuda/exchange", "cuda/pushed") + declared,
        shared_memory=4 * THREADS // 32,
    )
