"""A region's node as one launch."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from ....ir.graph import Graph, Node
from ....kernels.attention.form import PARTS as ATTENDS
from ....kernels.cuda.kept import included
from ....kernels.cuda.kernel import CudaKernel
from ....kernels.cuda.source import cuda_source
from ....rewrite.ledger import LOWERING, Entry, record
from ....target import as_target
from ..unknown import Unknown
from .attention import JOINS, MOST_JOINS, THREADS, Attention
from .peers import PARTS, Peers
from .pushed import PushedRegion
from .residual import ResidualRegion
from .source import declared, written
from .translate import translate

KERNEL = "grid"
"""The kernel of region nodes that this back end carries out."""

ATTENTION = tuple(f"attention/{name}" for name in (*ATTENDS, "cached_attention", "attention_phase"))
COUNTERS = JOINS + MOST_JOINS
"""Numbers of the barrier, of which two are used, and those of attentions."""


class GridRegion:
    """A region's body, ready to be launched.

    Args:
        blocks: as many as the device holds at once.
        arch: its architecture.
        peers: the memory that the ranks of a mesh share, for bodies with sums over them.

    Raises:
        Unknown: the body holds what this back end does not know.
    """

    def __init__(self, body: Graph, blocks: int, arch: str, peers: Peers | None = None) -> None:
        stages = translate(body)
        if stages.addends and peers is None:
            raise Unknown("sums over ranks that reach no memory of each other")
        source = written(stages, blocks, arch, 1 if peers is None else peers.ranks)
        self._own = [peers.places] if stages.addends and peers is not None else []
        self.blocks = blocks
        self._source = source
        self._read = [body.inputs.index(value) for value in stages.inputs]
        self._results = [source.outputs.index(name) for name in stages.results]
        made = stages.arrays | {"done": ((source.room // 4,), mx.uint32)}
        self._shapes = [made[name][0] for name in source.outputs]
        self._dtypes = [made[name][1] for name in source.outputs]
        known = {name: value.dtype for value, name in stages.inputs.items()}
        known |= {name: dtype for name, (_, dtype) in made.items()} | {"places": mx.uint64}
        name = "qgraph_region_" + hashlib.sha1(source.text.encode()).hexdigest()[:12]
        self._kernel = _kernel(
            name, source.inputs, source.outputs, source.text, source.shared_memory,
            declared(name, source, lambda n: known.get(n, mx.uint32)),
            any(isinstance(phase, Attention) for phase in stages.phases),
        )  # fmt: skip

    @staticmethod
    def on(node: Node, device: mx.Device, peers: Peers | None = None) -> Launched | None:
        """A region for the GPU of this process; None where its body must run instead, with the
        reason in the ledger."""
        try:
            if device.type == mx.DeviceType.cpu:
                raise Unknown(f"it was formed for a GPU, this is {device}")
            (body,) = node.bodies
            found = ResidualRegion.of(body) or PushedRegion.of(body, peers)
            return found or GridRegion(body, multiprocessors(), as_target(device).arch, peers)
        except Unknown as error:  # formed by another version, or for another GPU
            record(Entry.of(node, LOWERING, "refused", f"it runs by its body: {error}", types=()))
            return None

    def __call__(
        self, inputs: Sequence[mx.array], counters: mx.array, last: mx.array
    ) -> tuple[list[mx.array], mx.array]:
        """The results, and what the next launch is given as `last`: it will wait for this one.

        Args:
            counters: of the barrier, all 0.
        """
        made = self._kernel(
            inputs=[*(inputs[i] for i in self._read), *self._own, counters, last],
            grid=(self.blocks * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=self._shapes,
            output_dtypes=self._dtypes,
        )
        return [made[i] for i in self._results], made[-1]


Resident = GridRegion | PushedRegion
"""Regions whose blocks wait for one another, so that all are resident: no two may run at a time."""
Launched = Resident | ResidualRegion
"""How a region is launched."""


@cache
def _kernel(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    text: str,
    shared: int,
    declaration: str,
    attends: bool,
) -> CudaKernel:
    return CudaKernel(
        name=name,
        inputs=inputs,
        outputs=outputs,
        header=cuda_source(*PARTS, *(ATTENTION if attends else ())) + declaration,
        source=included(text),
        shared_memory=shared,
    )


@cache
def multiprocessors() -> int:
    """How many the GPU has; 132, an H100's, where there is none.  A block on each is resident."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 132
    count = ctypes.c_int()
    driver.cuInit(0)
    failed = driver.cuDeviceGetAttribute(ctypes.byref(count), 16, 0)  # MULTIPROCESSOR_COUNT
    return 132 if failed else count.value
