"""What a program is compiled for: device, backend and machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace

import mlx.core as mx

from .errors import InputError
from .mesh import Mesh


@dataclass(frozen=True, slots=True)
class Target:
    """A device and what is known of the machine behind it.

    Attributes:
        device: MLX's device.
        backend: "cpu", "cuda" or "metal".
        arch: the processor ("x86_64", "arm64"), or the GPU's architecture and name: an H100 and an
            H200 are both "sm_90".
        cores: processor cores that this process may use; streams of a CPU target.
        mesh: the ranks that a graph is spread over; None is one device.
    """

    device: mx.Device
    backend: str
    arch: str
    cores: int
    mesh: Mesh | None = None

    def __str__(self) -> str:
        where = f"{self.backend} ({self.arch}, {self.cores} cores)"
        return where if self.mesh is None else f"{where}, {self.mesh.size} ranks"

    @property
    def is_cpu(self) -> bool:
        return self.backend == "cpu"


def as_target(target: Target | str | mx.Device | mx.DeviceType | None = None) -> Target:
    """The target for "cpu", "gpu", an `mx.Device` or, with None, MLX's default device.

    Raises:
        InputError: it names no device, or there is no such device here.

    >>> as_target("cpu").backend
    'cpu'
    """
    if isinstance(target, Target):
        return target
    if target is None:
        device = mx.default_device()
    elif isinstance(target, str):
        if target not in ("cpu", "gpu"):
            raise _refusal(target)
        device = mx.Device(mx.cpu if target == "cpu" else mx.gpu, 0)
    elif isinstance(target, mx.Device):
        device = target
    elif isinstance(target, mx.DeviceType):
        device = mx.Device(target, 0)
    else:
        raise _refusal(target)
    if not mx.is_available(device):
        raise InputError(
            f"target={target!r}: this build of MLX has no {device}", hint="try target='cpu'"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if device.type == mx.cpu:
        return Target(device, "cpu", platform.machine(), cores or 1)
    backend = "metal" if mx.metal.is_available() else "cuda"
    info = mx.device_info(device)
    arch = f"{info.get('architecture', 'gpu')} {info.get('device_name', '')}".rstrip()
    return Target(device, backend, arch, cores or 1)


def _refusal(target: object) -> InputError:
    return InputError(f"target={target!r} is none", hint="give 'cpu', 'gpu' or an mx.Device")


def on_mesh(target: Target, mesh: Mesh | None) -> Target:
    """The target with a mesh, or as it is where none is given."""
    return target if mesh is None else replace(target, mesh=mesh)
