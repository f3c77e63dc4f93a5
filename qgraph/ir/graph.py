"""The graph: immutable nodes, values and graphs, compared by identity.

A node's `args` map each parameter of its op to a value, to a tuple of values, or to something
static (an axis, a dtype).  `inputs` are the values among them in order and `attrs` the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx

from ..errors import InputError, QGraphError, writing
from ..origin import NOWHERE, Origin, renewed
from ..tree import Tree
from ..types import TensorType, type_of

if TYPE_CHECKING:
    import networkx as nx

Stage = Literal["run", "pack", "prepare"]
"""When a node runs: at every call, once for all, or once for each set of parameters."""

StreamLike = int | str | mx.Device | mx.DeviceType | mx.Stream | None
"""A number given by `assign-streams`, or what the user asked for."""


class Immutable:
    """A base: what `__init__` sets stays."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        raise AttributeError(f"a {kind} is immutable: make another, as its replace() does")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)


_set = object.__setattr__  # for `__init__` alone


class Value(Immutable):
    """One tensor of a graph: output `index` of `node`."""

    __slots__ = ("index", "node", "type")

    index: int
    node: Node
    type: TensorType

    def __init__(self, node: Node, index: int, type: TensorType) -> None:
        _set(self, "node", node)
        _set(self, "index", index)
        _set(self, "type", type)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dtype(self) -> mx.Dtype:
        return self.type.dtype

    @property
    def ndim(self) -> int:
        return len(self.type.shape)

    def __repr__(self) -> str:
        return f"<{self.node.op}:{self.index} {self.type}>"


def map_values(arg: Any, fn: Callable[[Value], Any]) -> Any:
    """`arg` with `fn` applied to every value in it, tuples included."""
    if isinstance(arg, Value):
        return fn(arg)
    if isinstance(arg, tuple):
        return tuple(map_values(item, fn) for item in arg)
    return arg


def _collect(arg: Any, found: list[Value]) -> None:
    if isinstance(arg, Value):
        found.append(arg)
    elif isinstance(arg, tuple):
        for item in arg:
            _collect(item, found)


_serials = itertools.count()


class Node(Immutable):
    """One operation.

    Attributes:
        op: name in the table of ops, or "input", "constant", or a loop's.
        args: parameter name to value, tuple or static thing.
        inputs: the values among `args`, in order.
        outputs: the node's values.
        bodies: closed graphs of a loop or a branch.
        origin: the user's line, and the pass that made the node.
        stream: where to run it; None is the program's default.
        kernel: how the target carries it out; "" is MLX's own choice.
        stage: when it runs.
        inferred: did MLX give the types for these very arguments?  Then nobody need ask it again.
        serial: counts nodes in the order they were made.
    """

    __slots__ = (
        "args",
        "bodies",
        "inferred",
        "inputs",
        "kernel",
        "op",
        "origin",
        "outputs",
        "serial",
        "stage",
        "stream",
    )

    op: str
    args: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    bodies: tuple[Graph, ...]
    origin: Origin
    stream: StreamLike
    kernel: str
    stage: Stage
    inferred: bool
    serial: int

    def __init__(
        self,
        op: str,
        args: Mapping[str, Any],
        types: Iterable[TensorType],
        *,
        bodies: Sequence[Graph] = (),
        origin: Origin = NOWHERE,
        stream: StreamLike = None,
        kernel: str = "",
        stage: Stage = "run",
        inferred: bool = False,
    ) -> None:
        found: list[Value] = []
        for arg in args.values():
            _collect(arg, found)
        _set(self, "op", op)
        frozen = type(args) is MappingProxyType  # those of another node, or made for this one
        _set(self, "args", args if frozen else MappingProxyType(dict(args)))
        _set(self, "inputs", tuple(found))
        _set(self, "outputs", tuple([Value(self, i, t) for i, t in enumerate(types)]))
        _set(self, "bodies", tuple(bodies))
        _set(self, "origin", origin)
        _set(self, "stream", stream)
        _set(self, "kernel", kernel)
        _set(self, "stage", stage)
        _set(self, "inferred", inferred)
        _set(self, "serial", next(_serials))

    @property
    def output(self) -> Value:
        """The first output; most nodes have only that one."""
        return self.outputs[0]

    @property
    def attrs(self) -> dict[str, Any]:
        """The static arguments."""
        found: list[Value] = []
        result = {}
        for name, arg in self.args.items():
            found.clear()
            _collect(arg, found)
            if not found and arg is not None and arg != ():
                result[name] = arg
        return result

    def value(self, name: str) -> Value | None:
        """The value given for parameter `name`, or None."""
        arg = self.args.get(name)
        return arg if isinstance(arg, Value) else None

    def operand(self, name: str) -> Value:
        """The value given for parameter `name`, which must be there."""
        arg = self.args[name]
        if not isinstance(arg, Value):
            raise KeyError(f"{self.op} has no tensor for {name!r}")
        return arg

    def replace(self, **changes: Any) -> Node:
        """A new node with some fields changed; outputs are new values of the same types."""
        as_before = changes.keys().isdisjoint(("op", "args", "types"))
        inferred = changes.pop("inferred", self.inferred and as_before)
        types = changes.pop("types", None) or [v.type for v in self.outputs]
        fields = {
            name: changes.pop(name, getattr(self, name))
            for name in ("bodies", "stream", "kernel", "stage")
        }
        fields["origin"] = changes.pop("origin", None) or renewed(self.origin)
        op, args = changes.pop("op", self.op), changes.pop("args", self.args)
        if changes:
            raise TypeError(f"Node has no field {next(iter(changes))!r}")
        return Node(op, args, types, inferred=inferred, **fields)

    def with_inputs(self, replace: Mapping[Value, Value]) -> Node:
        """The same node over other values, or this very node where none of them changes."""
        if not self.inputs or replace.keys().isdisjoint(self.inputs):
            return self
        pairs = [(v, replace.get(v, v)) for v in self.inputs]
        if all(new is old for old, new in pairs):
            return self
        args = {n: map_values(a, lambda v: replace.get(v, v)) for n, a in self.args.items()}
        same = self.inferred and all(new.type == old.type for old, new in pairs)
        return self.replace(args=args, inferred=same)

    def __repr__(self) -> str:
        return f"<Node {self.op} {' '.join(str(v.type) for v in self.outputs)}>"


def input_value(type: TensorType, name: str = "", parameter: bool = False) -> Value:
    """A new graph input."""
    return Node("input", {"name": name, "parameter": parameter}, [type]).output


class Data:
    """The array of a constant, which packing lets go once nothing needs it any more.

    Attributes:
        parts: axis and length of the parts that a rank of a mesh takes of it.
        again: reads the array again after it was released, if that can be done.
        mark: what tells it from others without computing it, if that is known.
    """

    __slots__ = ("_array", "again", "mark", "parts")

    def __init__(self, array: mx.array) -> None:
        self._array: mx.array | None = array
        self.parts: set[tuple[int, int]] = set()
        self.again: Callable[[], mx.array] | None = None
        self.mark: Callable[[], str] | None = None

    @property
    def array(self) -> mx.array:
        if self._array is None and self.again is not None:
            return self.again()
        if self._array is None:
            raise QGraphError(
                "the float array of a constant was released when a program packed it",
                hint="trace the function again, or compile with release=False",
            )
        return self._array

    @property
    def is_released(self) -> bool:
        return self._array is None

    def release(self) -> None:
        self._array = None


def constant_value(array: mx.array, name: str = "", origin: Origin = NOWHERE) -> Value:
    """A new constant; the array is neither evaluated nor copied."""
    args = {"data": Data(array), "name": name}
    return Node("constant", args, [type_of(array)], origin=origin).output


def is_constant(value: Value) -> bool:
    return value.node.op == "constant"


def is_scalar(value: Value) -> bool:
    """Is it a constant with one element and no axes, such as the 2 of `x * 2`?"""
    return value.node.op == "constant" and value.type.shape == ()


WRITERS: dict[str, Callable[..., str]] = {}
"""How a graph is written, by suffix; `qgraph.inspection` fills it, as graphs know no writer."""

READERS: dict[str, Callable[[str], Graph]] = {}
"""How a graph is read, by suffix."""


class Graph(Immutable):
    """Inputs, nodes in topological order, outputs; refers to nothing outside itself."""

    name: str
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    in_tree: Tree | None
    out_tree: Tree | None
    weights: tuple[Any, ...]
    """Those of modules that it was made of: where each is kept (`tracing/weights`)."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[Value],
        nodes: Sequence[Node],
        outputs: Sequence[Value],
        *,
        in_tree: Tree | None = None,
        out_tree: Tree | None = None,
        weights: Iterable[Any] = (),
    ) -> None:
        _set(self, "name", name)
        _set(self, "inputs", tuple(inputs))
        _set(self, "nodes", tuple(nodes))
        _set(self, "outputs", tuple(outputs))
        _set(self, "in_tree", in_tree)
        _set(self, "out_tree", out_tree)
        _set(self, "weights", tuple(weights))

    def replace(self, **changes: Any) -> Graph:
        """A graph with some of name, inputs, nodes, outputs, in_tree, out_tree, weights changed."""
        fields = ("name", "inputs", "nodes", "outputs", "in_tree", "out_tree", "weights")
        return Graph(**{f: changes.get(f, getattr(self, f)) for f in fields})

    @cached_property
    def users(self) -> dict[Value, tuple[Node, ...]]:
        """For each value, the nodes that read it (a node once, however often it reads it)."""
        readers: dict[Value, dict[Node, None]] = {}
        for node in self.nodes:
            for value in node.inputs:
                readers.setdefault(value, {})[node] = None
        return {value: tuple(nodes) for value, nodes in readers.items()}

    @cached_property
    def ops(self) -> frozenset[str]:
        """Those of its nodes, without what stands in bodies."""
        return frozenset([node.op for node in self.nodes])

    def constants(self) -> list[Node]:
        return [node for node in self.nodes if node.op == "constant"]

    def walk(self, regions: bool = True) -> Iterable[tuple[Graph, Node]]:
        """Every node with the graph that holds it, those of bodies after their loop.

        Args:
            regions: those of the bodies of regions too, which a back end has settled.
        """
        pending = [self]
        while pending:
            graph = pending.pop()
            for node in graph.nodes:
                yield graph, node
                if regions or node.op != "region":
                    pending.extend(node.bodies)

    def count(self) -> int:
        """Operations in the graph and in its bodies; constants are not operations."""
        return sum(node.op != "constant" for _, node in self.walk())

    def to_networkx(self) -> nx.MultiDiGraph:
        """Nodes and the values between them; edges carry `value` and `position`."""
        import networkx as nx  # here, as it takes a fifth of the time to import qgraph

        result = nx.MultiDiGraph(name=self.name)
        for value in self.inputs:
            result.add_node(value.node)
        result.add_nodes_from(self.nodes)
        for node in self.nodes:
            for position, value in enumerate(node.inputs):
                result.add_edge(value.node, node, value=value, position=position)
        return result

    def format(self, **options: Any) -> str:
        """The graph as text; options are the fields of `qgraph.inspection.text.Format`."""
        return WRITERS[".txt"](self, **options)

    def to_json(self) -> str:
        """The graph as JSON, its arrays embedded; `from_json` reads it."""
        return WRITERS[".json"](self)

    def to_dot(self) -> str:
        """The graph in the language of Graphviz."""
        return WRITERS[".dot"](self)

    def to_html(self) -> str:
        """The graph as a page for browsers, which needs no network."""
        return WRITERS[".html"](self)

    def to_model_explorer(self) -> str:
        """The graph in the JSON that Google's Model Explorer opens."""
        return WRITERS[".me.json"](self)

    @staticmethod
    def from_json(text: str) -> Graph:
        """The graph that `to_json` wrote."""
        return READERS[".json"](text)

    def save(self, path: str | Path) -> Path:
        """Write the graph in the format of the suffix.

        `.txt` is the text, `.json` can be read again, `.dot` is for Graphviz, `.html` for browsers,
        `.me.json` for Google's Model Explorer.

        Raises:
            InputError: there is no format of that suffix.
            QGraphError: the file cannot be written.
        """
        place = Path(path)
        # The longest first: a name that ends in .me.json ends in .json too.
        ends = sorted(filter(place.name.endswith, WRITERS), key=len)
        if not ends:
            known = ", ".join(WRITERS)
            raise InputError(
                f"no format {place.suffix!r}: a graph is saved as one of {known}",
                hint="give a file's name with one of these suffixes",
            )
        text = WRITERS[ends[-1]](self) + "\n"
        with writing(place):
            place.write_text(text, encoding="utf-8")
        return place

    def __str__(self) -> str:
        return self.format()

    def __repr__(self) -> str:
        return f"<Graph {self.name}: {len(self.nodes)} nodes>"


def reachable(outputs: Iterable[Value], stop: Iterable[Value] = ()) -> list[Node]:
    """The nodes that `outputs` need, in topological order; `stop` values are not entered."""
    seen: set[Node] = {value.node for value in stop}
    order: list[Node] = []
    stack = [(value.node, False) for value in reversed(list(outputs))]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((v.node, False) for v in reversed(node.inputs) if v.node not in seen)
    return order


def in_order(outputs: Iterable[Value], inputs: Iterable[Value]) -> list[Node]:
    """The nodes that `outputs` need, in the order in which they were made, without the inputs."""
    return sorted(reachable(outputs, stop=inputs), key=lambda node: node.serial)
