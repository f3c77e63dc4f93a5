"""The pack and prepare steps: what depends on weights alone, computed once.

Weights are packed one by one, and each float original is released before the next is read, so
that memory peaks at the packed model and one weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..ir.graph import Graph, Node, Value, is_constant, is_scalar, map_values
from ..kernels.progress import progress as said
from ..kernels.streams import Streams
from ..tracing.constants import Constants
from .interpret import Env, Interpreter
from .lower import captured_constants

Progress = Callable[[str, int, int], None]
"""Called with a weight's name, how many nodes are packed, and how many there are."""

Release = bool | Callable[[Value, bool], None]
"""Let go what only the pack step reads?  A function does so itself, or does not: it is given each
such constant, and whether nothing but parts were taken of it.  Programs to come find those parts in
the cache, if its array cannot be read again."""


class PackCache:
    """Packed arrays shared by the specialisations of a program.

    A packed value is known by what it is computed from: the same ops, arguments and constants.
    Traces that share `constants` have one constant for each array.
    """

    def __init__(self) -> None:
        self.constants = Constants()
        self._arrays: dict[int, list[mx.array]] = {}
        self._numbers: dict[Any, int] = {}
        self._count = itertools.count()  # programs in several threads may share this
        self._held: dict[int, Any] = {}

    def keys(self, graph: Graph) -> dict[Node, int]:
        """A number for each constant and packed node: nodes that compute the same have the same."""
        keys: dict[Node, int] = {}

        def name(value: Value) -> str:  # marked, so that no static number is taken for a value
            return f"value {keys[value.node]}.{value.index}"

        for node in graph.nodes:
            if node.op == "constant":
                data = node.args["data"]
                self._held[id(data)] = data  # so that its identity stays its own
                what: Any = id(data)
                if is_scalar(node.output) and not data.is_released:  # each trace has its own
                    what = repr(data.array.dtype), repr(data.array.item())
            elif node.stage == "pack":
                args = ((arg, repr(map_values(given, name))) for arg, given in node.args.items())
                what = node.op, *args
            else:
                continue
            keys[node] = self._numbers.setdefault(what, next(self._count))
        return keys

    def get(self, key: int) -> list[mx.array] | None:
        return self._arrays.get(key)

    def put(self, key: int, arrays: list[mx.array]) -> None:
        self._arrays[key] = arrays


@dataclass(frozen=True)
class Staged:
    """The nodes of one stage, and which of their values later stages read."""

    nodes: tuple[Node, ...]
    wanted: frozenset[Value]

    @staticmethod
    def of(graph: Graph, stage: str) -> Staged:
        nodes = tuple(n for n in graph.nodes if n.stage == stage and n.op != "constant")
        made = {v for n in nodes for v in n.outputs}
        later = {v for n in graph.nodes if n.stage != stage for v in n.inputs}
        return Staged(nodes, frozenset(made & (later | set(graph.outputs))))


def whole(value: Value) -> Value:
    """What a value is sliced off: a slice is a view, which holds the buffer of all of it."""
    while value.node.op == "getitem" and len(value.node.inputs) == 1:  # no arrays in the index
        value = value.node.inputs[0]
    return value


def part_of(node: Node) -> Value | None:
    """The constant that this node gives a part of, copied off it, as a rank of a mesh takes it."""
    if node.op not in ("contiguous", "pad") or node.inputs[0].node.op != "getitem":
        return None
    cut = node.inputs[0].node.inputs
    return cut[0] if len(cut) == 1 and is_constant(cut[0]) else None


def run_constants(graph: Graph) -> list[Node]:
    """The constants that are read when the program runs, not only while packing."""
    return [
        node
        for node in graph.constants()
        if node.output in graph.outputs
        or any(user.stage != "pack" for user in graph.users.get(node.output, ()))
    ]


def pack(
    graph: Graph,
    streams: Streams,
    *,
    release: Release = False,
    cache: PackCache | None = None,
    progress: Progress | None = None,
) -> dict[Value, mx.array]:
    """Run the pack step and evaluate the other constants.

    Args:
        release: let float originals go that only the pack step reads.
        cache: holds what was packed before, from the same constants.

    Returns:
        Every array known before the first call: packed values and remaining constants.
    """
    cache = cache or PackCache()
    staged = Staged.of(graph, "pack")
    kept = run_constants(graph)
    # Nodes may share an array: a copy that was lifted out of a loop, and what stays in its body.
    inside = [n for home, n in graph.walk() if home is not graph and n.op == "constant"]
    keep_data = {id(node.args["data"]) for node in (*kept, *inside)}
    last_reader = {v: node for node in staged.nodes for v in node.inputs}
    # Another specialisation may as well read the whole of what rows are sliced off.
    held = staged.wanted | {whole(v) for v in staged.wanted}
    keys = cache.keys(graph)
    needed = set(staged.wanted)
    for node in reversed(staged.nodes):
        if cache.get(keys[node]) is None and not needed.isdisjoint(node.outputs):
            needed.update(node.inputs)
    env: Env = {}
    with said("packing weights", len(staged.nodes)) as step:
        for done, node in enumerate(staged.nodes, 1):
            if progress is not None:
                progress(_source_name(node), done, len(staged.nodes))
            arrays = cache.get(keys[node])
            if arrays is None and not needed.isdisjoint(node.outputs):
                for value in node.inputs:
                    if value not in env:
                        env[value] = value.node.args["data"].array
                Interpreter(streams).run(node, env)
                arrays = [env[v] for v in node.outputs]
                mx.eval(arrays)
                of = part_of(node) if callable(release) else None
                if of is not None and of.node.args["data"].again is None:
                    cache.put(keys[node], arrays)
                if any(v in held for v in node.outputs):
                    cache.put(keys[node], arrays)
            if arrays is not None:
                env.update(zip(node.outputs, arrays, strict=True))
            for value in node.inputs:
                if last_reader[value] is node and value not in staged.wanted:
                    env.pop(value, None)
                    data = value.node.args.get("data")
                    if release and data is not None and id(data) not in keep_data:
                        if callable(release):
                            cut = (graph.users[v] for n in graph.users[value] for v in n.outputs)
                            release(value, all(part_of(n) is value for ns in cut for n in ns))
                        else:
                            data.release()
            step()
    made = [value for node in staged.nodes for value in node.outputs]
    known = {value: env[value] for value in made if value in staged.wanted}
    return known | captured_constants(kept)


def _source_name(node: Node) -> str:
    for value in node.inputs:
        if value.node.op == "constant":
            return str(value.node.args["name"])
    return node.op


class Prepared:
    """Parameters after `Program.prepare`: pass it where the parameters would go.

    Holds the packed arrays and those parameters that the program still reads as they are; the
    float originals of packed ones are not kept.
    """

    def __init__(self, arrays: Sequence[mx.array], owner: object) -> None:
        self.arrays = tuple(arrays)
        self.owner = owner

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in self.arrays)

    def __repr__(self) -> str:
        return f"Prepared({len(self.arrays)} arrays, {self.nbytes / 2**20:.1f} MiB)"


class PreparedOnDemand(Prepared):
    """Parameters of a program that compiles per input types, packed for each when it is met.

    The arguments are kept, as the types to come may want them in another form.
    """

    def __init__(self, arguments: Sequence[Any], arrays: Sequence[mx.array], owner: object) -> None:
        super().__init__(arrays, owner)
        self.arguments = tuple(arguments)
        self._packed: dict[object, Prepared] = {}

    def packed(self, key: object, pack: Callable[[], Sequence[mx.array]]) -> Prepared:
        """What `pack` gives, once for each specialisation, which `key` stands for."""
        if key not in self._packed:
            self._packed[key] = Prepared(pack(), key)
        return self._packed[key]
