"""Memory that the GPUs of a mesh share, for sums that a region takes over the ranks.

A collective of NCCL is a launch of its own, which splits a region in two, and takes some 40 µs
within MLX's CUDA graphs.  Where the GPUs of one machine reach each other's memory, a kernel adds up
by itself, within a region (`kernels/cuda/peers.cuh`) or in a launch of its own (`exchange.cuh`).
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ....kernels.cuda.source import cuda_source
from ....mesh import INBOX, Mesh

HEADER = 4096
"""Bytes before the halves, for the barrier; as `peers.cuh` has it."""

HALF = 4 << 20
"""Bytes that one launch may take; the next takes the other half."""

BLOCKS, PIECE, TURNS = 128, 32 << 10, 4
"""How many blocks exchange something at a time, bytes of each in a turn, and how many turns there
is room for; as `exchange.cuh` has it."""

INBOX_AT = HEADER + 2 * HALF + BLOCKS * (64 + TURNS * PIECE)
"""Where a header of 128 bytes lies, and after it two halves for what is pushed, which are all ones
at first; as `pushed.cuh` has it."""

BYTES = INBOX_AT + 128 + 2 * INBOX
"""How much memory each rank shares."""

PARTS = ("cuda/words", "matmul/tiled/instructions", "matmul/tiled/formats", "cuda/grid",
         "cuda/numbers", "cuda/phases", "cuda/pick", "cuda/products", "cuda/routing",
         "cuda/peers")  # fmt: skip
"""What kernels with such sums include."""

_PLACES = 64  # small arrays of MLX lie in memory that is slow to reach
_WORDS = 16  # of a handle


@dataclass(frozen=True)
class Peers:
    """The memory of each rank, as this process sees it.

    Attributes:
        places: what kernels are given: this rank, the bytes of a half, addresses by rank.
    """

    ranks: int
    places: mx.array


_found: dict[int, Peers | None] = {}
_lock = threading.Lock()


def connect(mesh: Mesh | None) -> Peers | None:
    """The memory that a launched mesh shares; None where a rank cannot reach that of another.

    The first call is a collective: every rank must make it.
    """
    if not may_connect(mesh):
        return None
    assert mesh is not None
    with _lock:
        if mesh.size not in _found:
            _found[mesh.size] = _connected(mesh)
        return _found[mesh.size]


def may_connect(mesh: Mesh | None) -> bool:
    """Is it worth a try: is it a mesh of GPUs, each with a process of its own?"""
    return mesh is not None and mesh.size > 1 and not mesh.in_one_process and mesh.backend == "nccl"


def _connected(mesh: Mesh) -> Peers | None:
    assert mesh.rank is not None
    driver = _driver()
    own = None if driver is None else driver.allocate()
    handle = [0] * _WORDS if own is None else own[1]
    row = mx.array([[own is not None, _machine(), *handle]], mx.uint32)
    rows: Any = mx.distributed.all_gather(row, group=mesh.group).tolist()
    places: Sequence[int] | None = None
    if driver is not None and own is not None and all(r[:2] == [1, _machine()] for r in rows):
        places = driver.open_all([r[2:] for r in rows], mesh.rank, own[0])
    if not _on_all(places is not None, mesh):
        return None
    assert places is not None
    table = np.zeros(_PLACES, np.uint64)
    table[: 2 + mesh.size] = [mesh.rank, HALF, *places]
    peers = Peers(mesh.size, mx.array(table))
    return peers if _on_all(_adds_up(peers), mesh) else None


def _on_all(here: bool, mesh: Mesh) -> bool:
    word = mx.array([int(here)], mx.int32)
    return bool(mx.distributed.all_min(word, group=mesh.group).item())


def _machine() -> int:
    """A number of this machine since it was started."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name += Path("/proc/sys/kernel/random/boot_id").read_text()
    return zlib.crc32(name.encode())


def _adds_up(peers: Peers) -> bool:
    """A sum over the ranks, tried: it must come, and be right."""
    kernel: Any = mx.fast.cuda_kernel(
        name=f"qgraph_peers_{peers.ranks}",
        input_names=["places"],
        output_names=["found"],
        header=cuda_source(*PARTS),
        source=f"""
            qgraph::phases::Peers<{peers.ranks}> peers(places);
            peers.put<float>(0, 128, threadIdx.x, float(peers.rank + threadIdx.x));
            peers.arrive();
            const bool met = peers.met(1ll << 24);
            found[threadIdx.x] = met ? peers.sum<float>(0, 128, threadIdx.x) : -1.0f;
            if (threadIdx.x == 0) peers.leave();
        """,
    )
    try:
        (found,) = kernel(
            inputs=[peers.places], grid=(32, 1, 1), threadgroup=(32, 1, 1),
            output_shapes=[(32,)], output_dtypes=[mx.float32],
        )  # fmt: skip
        first = peers.ranks * (peers.ranks - 1) // 2
        return bool(found.tolist() == [first + peers.ranks * i for i in range(32)])
    except (RuntimeError, ValueError):
        return False


class _Handle(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint32 * _WORDS)]


def _driver() -> _Driver | None:
    try:
        return _Driver()
    except (OSError, RuntimeError):
        return None


class _Driver:
    """CUDA's driver, in the context of the GPU that MLX computes on: each process's first.

    Another may be this thread's, as that of NCCL is where a process sees several GPUs; memory of it
    kernels could not reach.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            raise RuntimeError(f"{name} gave {status}")

    def allocate(self) -> tuple[int, list[int]] | None:
        """Memory that lives as long as the process: its address, and what opens it."""
        place, handle = ctypes.c_uint64(), _Handle()
        try:
            self._call("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(BYTES))
            zeros = INBOX_AT + 128
            for start, stop, byte in ((0, zeros, 0), (zeros, BYTES, 0xFF)):
                at, count = ctypes.c_uint64(place.value + start), ctypes.c_size_t(stop - start)
                self._call("cuMemsetD8_v2", at, ctypes.c_ubyte(byte), count)
            self._call("cuCtxSynchronize")
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), place)
        except RuntimeError:
            return None
        return place.value, list(handle.words)

    def open_all(self, handles: list[list[int]], rank: int, own: int) -> list[int] | None:
        """The addresses of all ranks' memory, of which `own` is this rank's."""
        places = []
        for of, words in enumerate(handles):
            place = ctypes.c_uint64(own)
            if of != rank:
                handle = _Handle((ctypes.c_uint32 * _WORDS)(*words))
                try:
                    self._call("cuIpcOpenMemHandle_v2", ctypes.byref(place), handle, 1)
                except RuntimeError:
                    return None
            places.append(place.value)
        return places
