"""Messages from one rank to another, of which the one graph that all ranks hold has both ends.

The n-th `recv` takes what the n-th `send` gives: from the rank that `recv` names to the one that
`send` names.  On other ranks nothing is sent, and zeros are received.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ...ir.graph import Graph, Node, Value, constant_value

_SEND, _RECV = "distributed.send", "distributed.recv"


class Message(NamedTuple):
    """One message.

    Attributes:
        src, dst: from which rank, and to which.
        sent: what the sender has.
    """

    send: Node
    src: int
    dst: int
    sent: Value

    def on(self, rank: int, node: Node) -> Sequence[Value] | None:
        """What an end becomes on a rank; None if it stays."""
        if node.op == _SEND:
            return None if rank == self.src else [node.operand("x")]
        return None if rank == self.dst else [zeros_like(node.output)]


def messages(graph: Graph) -> dict[Node, Message]:
    """By both of their ends; none where an end is missing: another rank's graph has it then."""
    sends = [node for node in graph.nodes if node.op == _SEND]
    recvs = [node for node in graph.nodes if node.op == _RECV]
    if len(sends) != len(recvs):
        return {}
    found = {}
    for send, recv in zip(sends, recvs, strict=True):
        message = Message(send, recv.args["src"], send.args["dst"], send.operand("x"))
        if message.sent.type != recv.output.type or message.src == message.dst:
            return {}
        found[send] = found[recv] = message
    return found


def zeros_like(value: Value) -> Value:
    return constant_value(mx.zeros(value.shape, value.dtype))
