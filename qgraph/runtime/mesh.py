"""The ranks of a launched mesh keep an eye on one another.

MLX's collectives wait for ever for a rank that is not there (`nccl`), or end without saying which
one it was (`ring`).  So beside them each rank holds a TCP connection to rank 0.  Over it they
compare their plans before they run one, and a process that ends is noticed at once by its closed
connection; a machine that falls silent within `SILENCE` seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..analysis.meshes import is_collective
from ..errors import MeshError
from ..ir.graph import Graph
from ..mesh import Mesh

SILENCE = 9
"""Seconds after which a machine that does not answer counts as gone."""

GRACE = 3
"""Seconds that an error of MLX waits for word of a lost rank, which may be what it came of; and
that a rank which has ended stays for the others, where they may be reading its memory."""

PATIENCE = 120
"""Seconds that a rank waits for the others to make the plan that it has made."""

LOST = 70
"""Exit status of a rank whose mesh fell apart."""

_watches: dict[int, Watch] = {}
_lock = threading.Lock()


def watch(mesh: Mesh | None) -> Watch | None:
    """The watch over a launched mesh, begun by the first call; every rank must make it."""
    if mesh is None or mesh.rank is None or mesh.size == 1:
        return None
    with _lock:
        if mesh.size not in _watches:
            _watches[mesh.size] = Watch(mesh)
        return _watches[mesh.size]


def collectives(graph: Graph) -> list[str]:
    """What a graph says to other ranks, in order: on this they must agree."""
    return [
        f"{node.op} of {node.inputs[0].type if node.inputs else node.output.type}"
        for _, node in graph.walk()
        if is_collective(node)
    ]


class Watch:
    """Connections to the other ranks, and the threads that listen on them."""

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.rank is not None
        self.rank, self.size = mesh.rank, mesh.size
        self._changed = threading.Condition()
        self._plans: dict[int, dict[int, list[str]]] = {}
        self._answers: dict[int, str] = {}
        self._left: set[int] = set()
        self._finish: Callable[[], None] | None = None
        self._count = 0
        self._ending = ""
        self._peers: dict[int, socket.socket] = {}
        self._words: dict[int, Iterator[dict[str, Any]]] = {}
        self._connect(mesh)
        for rank, words in self._words.items():
            threading.Thread(target=self._listen, args=(rank, words), daemon=True).start()
        atexit.register(self._leave)
        self._report_exceptions()

    # Connecting.

    def _connect(self, mesh: Mesh) -> None:
        """Rank 0 listens and tells the others where, by a collective of MLX."""
        server = socket.create_server(("", 0)) if self.rank == 0 else None
        place = [0] * 5
        if server is not None:
            host = socket.gethostbyname(_own_address())
            place = [*map(int, host.split(".")), server.getsockname()[1]]
        told = mx.distributed.all_sum(mx.array(place, mx.int32), group=mesh.group)
        *octets, port = (int(told[i].item()) for i in range(5))  # type: ignore[arg-type]
        if server is None:
            peer = socket.create_connection((".".join(map(str, octets)), port), PATIENCE)
            _keep_alive(peer)
            _send(peer, {"rank": self.rank})
            self._peers[0], self._words[0] = peer, _lines(peer)
            return
        server.settimeout(PATIENCE)
        for _ in range(self.size - 1):
            peer, _ = server.accept()
            _keep_alive(peer)
            words = _lines(peer)
            rank = int(next(words)["rank"])
            self._peers[rank], self._words[rank] = peer, words
        server.close()

    # Agreeing on plans.

    def agree(self, graph: Graph) -> None:
        """Wait until every rank has made this plan.

        Raises:
            MeshError: one has made another plan, or none in time; says which, and how it differs.
        """
        self.check()
        number, self._count = self._count, self._count + 1
        plan = [graph.name, *collectives(graph)]
        if self.rank:
            _send(self._peers[0], {"plan": number, "says": plan})
        else:
            self._take_plan(number, 0, plan)
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._answers, PATIENCE):
                missing = sorted({*range(self.size)} - {*self._plans.get(number, ())})
                who = f"rank {', '.join(map(str, missing))}" if self.rank == 0 else "some rank"
                raise MeshError(
                    f"{who} has not made plan {number} ({graph.name}) within {PATIENCE} s",
                    hint="every rank must compile the same programs in the same order",
                )
            answer = self._answers[number]
        if answer:
            raise MeshError(
                f"the ranks' plans differ: {answer}",
                hint="give every rank the same function, types, weights, target and version",
            )

    def _take_plan(self, number: int, rank: int, plan: list[str]) -> None:
        """On rank 0: when all plans are there, say to all how they differ."""
        with self._changed:
            plans = self._plans.setdefault(number, {})
            plans[rank] = plan
            if len(plans) < self.size:
                return
            answer = difference(plans)
            for peer in self._peers.values():
                _send(peer, {"answer": number, "says": answer})
            self._answers[number] = answer
            self._changed.notify_all()

    def check(self) -> None:
        """Raise if a rank has ended, as nothing could be computed with it any more."""
        if self._left:
            rank = min(self._left)
            raise MeshError(
                f"rank {rank} has ended, and this program needs it",
                hint="every rank must make the same calls",
            )

    # Listening.

    def _listen(self, rank: int, words: Iterator[dict[str, Any]]) -> None:
        try:
            for word in words:
                if "plan" in word:
                    self._take_plan(word["plan"], rank, word["says"])
                elif "answer" in word:
                    with self._changed:
                        self._answers[word["answer"]] = word["says"]
                        self._changed.notify_all()
                elif "left" in word:
                    with self._changed:
                        self._left.add(word["left"])
                        self._changed.notify_all()
                    self._pass_on(word, rank)
                elif "lost" in word:
                    self._pass_on(word, rank)
                    self._end(word["lost"], word["why"])
        except OSError as error:
            self._lost(rank, f"its connection broke ({error.strerror or error})")
        else:
            self._lost(rank, "its process ended")

    def _lost(self, rank: int, why: str) -> None:
        if rank in self._left or self._ending:
            return
        self._pass_on({"lost": rank, "why": why}, rank)
        self._end(rank, why)

    def _pass_on(self, word: dict[str, Any], origin: int) -> None:
        """Rank 0 tells the others what it heard of one."""
        if self.rank == 0:
            for rank, peer in self._peers.items():
                if rank != origin:
                    with contextlib.suppress(OSError):
                        _send(peer, word)

    def _end(self, rank: int, why: str) -> None:
        """End this process: its main thread may be waiting in MLX, where nothing can reach it."""
        apart = any(self._answers.values())  # then this rank raises too, and says more
        if self._ending or apart:
            return
        self._ending = why
        print(
            f"qgraph: rank {rank} of {self.size} was lost: {why}; rank {self.rank} ends, as it "
            "cannot go on without it",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)

    # Leaving.

    def stay(self, finish: Callable[[], None]) -> None:
        """Have this rank end only when all do, for a while: others may be reading its memory.

        Args:
            finish: waits until this rank reads nothing of the others.
        """
        self._finish = finish

    def _leave(self) -> None:
        """Say that this rank ends as it should, or why it does not."""
        finish = None if self._ending else self._finish
        if finish is not None:
            finish()
        word = {"lost": self.rank, "why": self._ending} if self._ending else {"left": self.rank}
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                _send(peer, word)
        if finish is not None:
            with self._changed:
                self._changed.wait_for(lambda: len(self._left) == self.size - 1, GRACE)

    def _report_exceptions(self) -> None:
        before = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            if issubclass(kind, RuntimeError):  # `ring` raises when a rank is gone
                time.sleep(GRACE)  # a thread that hears of it ends this process
            words = str(error).splitlines()
            self._ending = f"it raised {kind.__name__}" + (f": {words[0]}" if words else "")
            before(kind, error, trace)

        sys.excepthook = hook


def difference(plans: dict[int, list[str]]) -> str:
    """How ranks' plans differ, in words; empty if they do not.

    >>> difference({0: ["f", "all_sum of f32[4]"], 1: ["f", "all_sum of f32[8]"]})
    'collective 0 is all_sum of f32[4] on rank 0, all_sum of f32[8] on rank 1'
    """
    first = plans[0]
    for rank, plan in sorted(plans.items()):
        if plan == first:
            continue
        if plan[0] != first[0]:
            return f"rank 0 made {first[0]}, rank {rank} made {plan[0]}"
        for i, (one, other) in enumerate(zip(first[1:], plan[1:], strict=False)):
            if one != other:
                return f"collective {i} is {one} on rank 0, {other} on rank {rank}"
        return f"rank 0 has {len(first) - 1} collectives, rank {rank} has {len(plan) - 1}"
    return ""


def _own_address() -> str:
    """Where the other ranks reach rank 0, as the launcher was told."""
    if "MLX_HOSTFILE" in os.environ:
        with open(os.environ["MLX_HOSTFILE"]) as file:
            first: Sequence[str] = json.load(file)[0]
        return first[0].rsplit(":", 1)[0]
    return os.environ.get("NCCL_HOST_IP", "127.0.0.1")


def _keep_alive(peer: socket.socket) -> None:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # macOS names the first one TCP_KEEPALIVE
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_KEEPALIVE"):
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPALIVE, 3)


def _send(peer: socket.socket, word: dict[str, Any]) -> None:
    peer.sendall(json.dumps(word).encode() + b"\n")


def _lines(peer: socket.socket) -> Iterator[dict[str, Any]]:
    """What a peer says, a line of JSON each."""
    rest = b""
    while True:
        line, found, after = rest.partition(b"\n")
        if found:
            rest = after
            yield json.loads(line)
            continue
        more = peer.recv(65536)
        if not more:
            return
        rest += more
