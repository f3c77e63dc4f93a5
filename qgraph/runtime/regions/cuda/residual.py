"""A residual that is added, and the norm of the sum, as one launch; see `residual.cuh`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from ....ir.graph import Graph, Node, Value
from ....kernels.cuda.kernel import CudaKernel, bounded
from ....kernels.cuda.source import cuda_source
from .expressions import FLOATS, TYPES, literal

NORM = "fast.rms_norm"
MOST_WARPS, MOST_CHUNKS = 16, 4
"""Warps of a row, and how often each of their threads takes 16 bytes."""
_WARP = 32 * 16  # bytes that a warp takes at once


class AddNorm(NamedTuple):
    """Two values that are added, and the norm of their sum.

    Attributes:
        x, residual, weight: what it takes.
        sum, norm: what it gives.
        nodes: all of it; the last two are the addition and the norm.
    """

    x: Value
    residual: Value
    weight: Value
    sum: Value
    norm: Value
    eps: float
    nodes: tuple[Node, ...]

    @staticmethod
    def at(graph: Graph, add: Node) -> AddNorm | None:
        """With this addition, if one norm reads it, whoever else does."""
        norms = [n for n in graph.users.get(add.output, ()) if n.op == NORM]
        if add.op != "add" or len(norms) != 1 or add.inputs[0] is add.inputs[1]:
            return None
        (norm,), type = norms, add.output.type
        weight, eps = norm.args["weight"], norm.args["eps"]
        row = type.shape[-1] * type.dtype.size
        if (
            any(value.type != type for value in add.inputs)
            or type.dtype not in FLOATS
            or weight is None
            or weight.dtype != type.dtype
            or row % 16
            or not 0 < row <= MOST_CHUNKS * MOST_WARPS * _WARP
            or not type.size
            or not isinstance(eps, int | float)
        ):
            return None
        x, residual = add.inputs
        return AddNorm(x, residual, weight, add.output, norm.output, eps, (add, norm))

    def places_in(self, body: Graph) -> tuple[list[int], list[int]]:
        """Which inputs of a body are x, residual and weight, and which of sum and norm each result
        is."""
        inputs = [body.inputs.index(v) for v in (self.x, self.residual, self.weight)]
        return inputs, [(self.sum, self.norm).index(v) for v in body.outputs]


class ResidualRegion:
    """A region's body that is such a sum and its norm, of any number of rows.

    Its launch waits for no other of its blocks, so it may run beside others.
    """

    def __init__(self, found: AddNorm, body: Graph) -> None:
        self._eps = found.eps
        self._at, self._results = found.places_in(body)

    @staticmethod
    def of(body: Graph) -> ResidualRegion | None:
        found = AddNorm.at(body, body.nodes[0])
        if found is None or len(body.nodes) != 2:
            return None
        return ResidualRegion(found, body)

    def __call__(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        x, residual, weight = (inputs[i] for i in self._at)
        kernel, threads = _kernel(x.dtype, x.shape[-1], self._eps)
        made = kernel(
            inputs=[x, residual, weight],
            grid=(x.size // x.shape[-1] * threads, 1, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[x.shape, x.shape],
            output_dtypes=[x.dtype, x.dtype],
        )
        return [made[i] for i in self._results]


def warps_of(row: int) -> tuple[int, int]:
    """Warps for a row of so many bytes, and how often each of their threads takes 16 of them.

    >>> warps_of(128), warps_of(2048), warps_of(8192), warps_of(12288), warps_of(32768)
    ((1, 1), (4, 1), (16, 1), (16, 2), (16, 4))
    """
    warps = min(MOST_WARPS, 1 << (-(-row // _WARP) - 1).bit_length())
    return warps, -(-row // (warps * _WARP))


@cache
def _kernel(dtype: mx.Dtype, width: int, eps: float) -> tuple[CudaKernel, int]:
    """The kernel, and the threads of its blocks."""
    type = TYPES[dtype]
    warps, chunks = warps_of(width * dtype.size)
    form = f"{type}, {width}, {chunks}, {warps}"
    name = "qgraph_add_norm_" + hashlib.sha1(f"{form} {eps!r}".encode()).hexdigest()[:12]
    inputs, outputs = ["x", "residual", "weight"], ["sum", "normed"]
    arguments = [*(f"const {type}* {n}" for n in inputs), *(f"{type}* {n}" for n in outputs)]
    kernel = CudaKernel(
        name,
        inputs,
        outputs,
        f"""
            using namespace qgraph::phases;
            __shared__ float scratch[{warps}];
            add_norm<{form}>(x, residual, weight, sum, normed, {literal(eps)}, scratch);
        """,
        header=cuda_source("cuda/numbers", "cuda/residual")
        + bounded(name, ", ".join(arguments), 32 * warps),
    )
    return kernel, 32 * warps
