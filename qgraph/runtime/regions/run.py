"""A region's native form on the device that it is to run on."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Mapping

import mlx.core as mx

from ...ir.graph import Node, Value
from ...kernels.cpu.library import missing
from ...kernels.cpu.region import RegionError
from ...rewrite.ledger import LOWERING, Entry, record
from ...target import as_target
from .cpu.region import NativeRegion
from .unknown import Unknown


def bound(node: Node, known: Mapping[Value, mx.array], device: mx.Device) -> NativeRegion | None:
    """A region made ready with the arrays that are known; None where its body must run instead,
    with the reason in the ledger."""
    try:
        if device.type != mx.DeviceType.cpu:
            raise Unknown(f"it was formed for a CPU, this is {device}")
        if (why := missing()) is not None:
            raise Unknown(why)
        return NativeRegion(node, known, as_target(device).cores)
    except Unknown as error:  # formed by another version, or for another machine
        why = str(error)
    except (RegionError, OSError, subprocess.CalledProcessError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"a region runs by its body ({why}), which is slower", stacklevel=2)
    record(Entry.of(node, LOWERING, "refused", f"it runs by its body: {why}", types=()))
    return None
