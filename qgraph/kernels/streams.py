"""Streams: what users name, and those that a program numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def as_device(stream: Any) -> Any:
    """What MLX takes for the stream a user named; "cpu" and "gpu" are its devices."""
    return (
        mx.Device({"cpu": mx.cpu, "gpu": mx.gpu}[stream], 0) if isinstance(stream, str) else stream
    )


class Streams:
    """The streams of a program by number: 0 is the device's default, the rest are its own.

    Args:
        device: that the program runs on.
        group: the ranks that its collectives talk to; None where there is but one.
        peers: the memory that their GPUs share, for kernels that talk; None where they do not.
    """

    def __init__(self, device: mx.Device, group: Any = None, peers: Any = None) -> None:
        self.device = device
        self.group = group
        self.peers = peers
        self._streams: list[Any] = []

    def resolve(self, stream: Any) -> Any:
        """What MLX takes for a node's stream."""
        if stream is None or (isinstance(stream, int) and stream == 0):
            return None
        if not isinstance(stream, int):
            return as_device(stream)
        while len(self._streams) < stream:
            self._streams.append(mx.new_thread_local_stream(self.device))
        return self._streams[stream - 1]
