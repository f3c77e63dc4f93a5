"""A region's body as steps of the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ....ir.graph import Graph, Node, Value, is_scalar
from ..arrays import Array, Buffer
from ..steps import Step, Work
from ..unknown import Unknown
from .chains import ELEMENTWISE, LONGEST, Chain, as_constant, instruct
from .expanded import expanded
from .patterns import Pattern, find
from .refs import dtype_number, fill, h, ref
from .table import Table
from .views import VIEWS, is_view, view

Kind = Callable[["Translator", Node], None]
KINDS: dict[str, Kind] = {}
"""How each op that is neither elementwise nor a view becomes steps; the modules beside fill it."""


def kind(*ops: str) -> Callable[[Kind], Kind]:
    def register(function: Kind) -> Kind:
        KINDS.update(dict.fromkeys(ops, function))
        return function

    return register


PATTERNS: dict[type[Pattern], Callable[[Translator, Any], None]] = {}
"""How patterns become steps."""


class Translator:
    """Makes steps of one body's nodes, in order.

    Attributes:
        table: buffers.
        work: the steps and loops made so far.
        places: values that lie in memory.
        before_rounding: of rounded values that only products read, which round for themselves.
        mine: inputs that the body may write over.
    """

    def __init__(
        self,
        body: Graph,
        table: Table,
        given: Mapping[Value, Array],
        mine: Collection[Value] = (),
    ) -> None:
        self.body = body
        self.mine = mine
        self.table = table
        self.work: list[Work] = []
        self.places: dict[Value, Array] = dict(given)
        self.before_rounding: dict[Value, Value] = {}
        self._pending: dict[Value, tuple[Chain, int]] = {}
        self._chains: list[Chain] = []
        self._uses = _uses(body)

    # ---- Nodes ----------------------------------------------------------------------------------

    def run(self) -> None:
        """All nodes of the body.

        Raises:
            Unknown: one of them cannot be carried out; the message says why.
        """
        found = find(self.body, self._uses)
        for node in self.body.nodes:
            pattern = found.get(node)
            if pattern is None:
                self.node(node)
            elif not isinstance(pattern, str):
                PATTERNS[type(pattern)](self, pattern)

    def finish(self) -> list[Work]:
        """The work, once all that is read of it is asked for: chains know their results now."""
        for chain in self._chains:
            if chain.into is None and chain.outputs:
                self.work.append(self.chain_step(chain))
        self._chains.clear()
        return self.work

    def node(self, node: Node) -> None:
        if node.op == "constant":
            if not is_scalar(node.output):
                self.places[node.output] = self.table.fixed(node.args["data"].array)
        elif node.op in ELEMENTWISE:
            self._elementwise(node)
        elif is_view(node):
            results = view(node, self.array)
            if results is None:
                results = [self.copied(self.array(node.inputs[0]), node)]
                results[0] = results[0].reshaped(node.output.shape) or results[0]
            self.places.update(zip(node.outputs, results, strict=True))
        elif node.op in KINDS:
            KINDS[node.op](self, node)
        else:
            self.written_out(node, *expanded(node))

    def written_out(self, node: Node, graph: Graph, given: Sequence[Value]) -> None:
        """A node by a graph that computes the same of the values given."""
        self.places.update(
            (inner, self.array(outer)) for inner, outer in zip(graph.inputs, given, strict=True)
        )
        for inner in graph.nodes:
            for value in inner.outputs:  # of the last node of this kind
                self.places.pop(value, None)
                self._pending.pop(value, None)
            self.node(inner)
        for value, made in zip(node.outputs, graph.outputs, strict=True):
            self.places[value] = self.array(made)

    def uses(self, value: Value) -> int:
        """How often a value is read in the body, as a result of it too."""
        return self._uses.get(value, 0)

    # ---- Values ---------------------------------------------------------------------------------

    def array(self, value: Value) -> Array:
        """Where a value lies, written to memory if it was not yet."""
        if value in self.places:
            return self.places[value]
        if value in self._pending:
            chain, number = self._pending.pop(value)
            chain, number = _resolved(chain, number)
            made = self.table.array(value.shape, value.dtype)
            made.buffer.ready = chain.level
            chain.outputs.append((made, number))
        elif is_scalar(value):
            made = self.filled(as_constant(value, value.dtype), value.dtype)
        else:
            raise Unknown("a value that is not there")
        self.places[value] = made
        return made

    def wrote(self, buffer: Buffer) -> bool:
        """Does any step so far write into a buffer?"""
        return buffer.ready >= 0

    def contiguous(self, value: Value | Array, node: Node) -> Array:
        """The value row by row without gaps, copied if need be."""
        array = value if isinstance(value, Array) else self.array(value)
        return array if array.is_contiguous else self.copied(array, node)

    def own(self, value: Value, node: Node) -> Array:
        """An array of the value's elements to write into: its own where nobody else reads it."""
        array = self.array(value)
        free = value in self.mine if value.node.op == "input" else value.node.op not in VIEWS
        if free and self.uses(value) == 1 and array.is_whole and array.buffer.memory != "fixed":
            return array
        return self.copied(array, node)

    def result(self, node: Node, index: int = 0) -> Array:
        """A new array for a result of a node."""
        value = node.outputs[index]
        made = self.table.array(value.shape, value.dtype)
        self.places[value] = made
        return made

    def filled(self, number: float, dtype: mx.Dtype, shape: Sequence[int] = ()) -> Array:
        """An array of one number."""
        return self.computed(shape, dtype, lambda chain: chain.constant(number, dtype))

    def computed(
        self, shape: Sequence[int], dtype: mx.Dtype, make: Callable[[Chain], int], *reads: Array
    ) -> Array:
        """A new array of what `make` adds to a chain that may read some arrays."""
        chain = Chain(tuple(shape), 1 + max((a.buffer.ready for a in reads), default=-1))
        made = self.table.array(shape, dtype)
        chain.outputs.append((made, make(chain)))
        made.buffer.ready = chain.level
        self.work.append(self.chain_step(chain))
        return made

    # ---- Steps ----------------------------------------------------------------------------------

    def step(
        self,
        kind: int,
        args: Any,
        reads: Iterable[Array | None],
        writes: Iterable[Array],
        *nodes: Node,
        after: int = -1,
    ) -> Step:
        """A step in the first phase after all that it reads is there, and after phase `after`."""
        read = tuple(dict.fromkeys(a.buffer for a in reads if a is not None))
        written = tuple(dict.fromkeys(a.buffer for a in writes))
        level = 1 + max((b.ready for b in read), default=-1)
        made = Step(kind, max(level, after + 1), args, read, written, nodes)
        for buffer in written:
            buffer.ready = max(buffer.ready, made.level)
        self.work.append(made)
        return made

    def copied(self, array: Array, *nodes: Node) -> Array:
        """A copy, row by row."""
        made = self.table.array(array.shape, array.dtype)
        self.copy(array, made, *nodes)
        return made

    def copy(
        self,
        source: Array,
        goal: Array,
        *nodes: Node,
        reads: Iterable[Array] = (),
        source_starts: Mapping[int, Any] | None = None,
        goal_starts: Mapping[int, Any] | None = None,
        after: int = -1,
    ) -> Step:
        """Copy elements; starts (`qg_start`s by axis) move the first along an axis."""
        args = h.Copy()
        for name, array in (("x", source), ("y", goal)):
            viewed = getattr(args, name)
            viewed.at = ref(array)
            viewed.rank = array.ndim
            fill(viewed, shape=array.shape, strides=array.strides)
        for name, starts in (("x_starts", source_starts), ("y_starts", goal_starts)):
            for axis in range(h.RANK):
                at = (starts or {}).get(axis) or h.Start(ref(None), 0, 0)
                getattr(args, name)[axis] = at
        made = self.step(h.COPY, args, [source, *reads], [goal], *nodes, after=after)
        made.moved = 2 * goal.nbytes
        return made

    def cast(self, array: Array, dtype: mx.Dtype, *nodes: Node) -> Array:
        """Its elements in another dtype."""
        chain = Chain(array.shape, array.buffer.ready + 1, nodes=list(nodes))
        made = self.table.array(array.shape, dtype)
        chain.outputs.append((made, chain.add(h.OP_CAST, dtype, (chain.read(array),))))
        made.buffer.ready = chain.level
        self.work.append(self.chain_step(chain))
        return made

    def chain_step(self, chain: Chain) -> Step:
        read = tuple(dict.fromkeys(a.buffer for a in chain.inputs))
        written = tuple(dict.fromkeys(a.buffer for a, _ in chain.outputs))
        args = _Encoded(chain.encode)
        made = Step(h.ELEMENTWISE, chain.level, args, read, written, tuple(chain.nodes))
        if not made.nodes:
            made.moved = sum(a.nbytes for a in (*chain.inputs, *(a for a, _ in chain.outputs)))
        return made

    # ---- Chains ---------------------------------------------------------------------------------

    def _elementwise(self, node: Node) -> None:
        shape = node.output.shape
        for value in (*node.inputs, node.output):
            dtype_number(value.dtype)
        level = max((self._earliest(v, shape) for v in node.inputs), default=0)
        chain = self._chain(node, shape, level)
        chain.nodes.append(node)
        number = instruct(chain, node, partial(self._number, chain))
        self._pending[node.output] = chain, number

    def _earliest(self, value: Value, shape: tuple[int, ...]) -> int:
        """The first phase in which a chain of a shape can read a value."""
        if value in self._pending:
            chain, _ = _resolved(*self._pending[value])
            return chain.level + (chain.shape != shape)
        if is_scalar(value):
            return 0
        return self.array(value).buffer.ready + 1

    def _chain(self, node: Node, shape: tuple[int, ...], level: int) -> Chain:
        """The chain that a node goes on with, those of its operands joined; or a new one."""
        pending = [self._pending[v] for v in node.inputs if v in self._pending]
        chains = list(dict.fromkeys(_resolved(*each)[0] for each in pending))
        here = [c for c in chains if c.level == level and c.shape == shape]
        if sum(len(c.instructions) for c in here) > LONGEST:
            here, level = [], level + 1
        if here:
            for other in here[1:]:
                here[0].join(other)
            return here[0]
        made = Chain(shape, level)
        self._chains.append(made)
        return made

    def _number(self, chain: Chain, argument: Any, dtype: mx.Dtype) -> int:
        """The number of an argument in a chain, cast."""
        if not isinstance(argument, Value):
            return chain.constant(argument, dtype)
        if is_scalar(argument):
            return chain.constant(as_constant(argument, dtype), dtype)
        if argument in self._pending:
            its, number = _resolved(*self._pending[argument])
            if its is not chain:
                number = chain.read(self.array(argument))
        else:
            number = chain.read(self.array(argument))
        if argument.dtype == dtype:
            return number
        return chain.add(h.OP_CAST, dtype, (number,))


@dataclass(frozen=True)
class _Encoded:
    """Arguments that come with bytes of their own."""

    encode: Callable[[Callable[[Any], int]], Any]


def encoded(step: Step, place: Callable[[Any], int]) -> int:
    """Put a step's arguments among the region's bytes; where they begin."""
    args = step.args
    return place(args.encode(place) if isinstance(args, _Encoded) else args)


def _resolved(chain: Chain, number: int) -> tuple[Chain, int]:
    while chain.into is not None:
        number = chain.numbers[number]
        chain = chain.into
    return chain, number


def _uses(body: Graph) -> dict[Value, int]:
    found: dict[Value, int] = {}
    for node in body.nodes:
        for value in node.inputs:
            found[value] = found.get(value, 0) + 1
    for value in body.outputs:
        found[value] = found.get(value, 0) + 1
    return found
