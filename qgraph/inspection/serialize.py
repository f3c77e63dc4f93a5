"""Graphs as JSON and back.

A graph is a dict of plain data: its nodes in order, each with op, args, types and what else it
carries; values are written as node number and output index.  What JSON has no word for is a dict
with one key that begins with "$".  Arrays stay outside: constants name them, or embed small ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import QGraphError
from ..ir.graph import Graph, Node, Value, constant_value
from ..kernels import Problem
from ..origin import Origin
from ..tree import Tree
from ..types import DTYPES, SHORT_NAMES, TensorType, type_of
from .tree_json import read_tree, write_tree

FORMAT = 1
"""Changes when a graph written before can no longer be read."""

Arrays = dict[str, mx.array]


def to_json(graph: Graph, arrays: Arrays | None = None) -> str:
    """The graph as text; the same graph gives the same text.

    Args:
        graph: to write.
        arrays: takes the arrays of constants with axes, by the key under which the text names
            them; without it they are embedded.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.tanh(x) * 2, qg.spec((4,)), name="f")
    >>> str(from_json(to_json(graph))) == str(graph)
    True
    """
    return json.dumps({"format": FORMAT, "graph": _Writer(arrays).graph(graph)}, indent=1)


def from_json(text: str, arrays: Mapping[str, mx.array] | None = None) -> Graph:
    """The graph that `to_json` wrote.

    Args:
        arrays: those that `to_json` took out.

    Raises:
        QGraphError: the text is no graph, is of another format, or its arrays are missing.
    """
    try:
        data = json.loads(text)
        version = data["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise QGraphError(
            "this is not a graph in JSON", hint="write one by graph.to_json()"
        ) from None
    if version != FORMAT:
        raise QGraphError(f"the graph is of format {version}, this qgraph reads {FORMAT}")
    try:
        return _Reader(arrays or {}).whole(data["graph"])
    except _DAMAGED as error:
        if isinstance(error, QGraphError):
            raise
        raise QGraphError(
            f"this is a graph in JSON, but not a whole one ({type(error).__name__}: {error})",
            hint="it was damaged, or written by another qgraph; write it again",
        ) from None


_DAMAGED = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(RecursionError, RuntimeError, TypeError, ValueError),
)
"""What Python and MLX raise where a field is missing or holds something else."""


class _Writer:
    def __init__(self, arrays: Arrays | None) -> None:
        self._arrays = arrays
        self._count = 0
        self._places: dict[Node, int] = {}

    def graph(self, graph: Graph) -> dict[str, Any]:
        for value in graph.inputs:
            self._places[value.node] = len(self._places)
        inputs = [self._node(value.node) for value in graph.inputs]
        nodes = []
        for node in graph.nodes:
            nodes.append(self._node(node))
            self._places[node] = len(self._places)
        return {
            "name": graph.name,
            "inputs": inputs,
            "nodes": nodes,
            "outputs": [self._arg(v) for v in graph.outputs],
            "in_tree": write_tree(graph.in_tree) if graph.in_tree else None,
            "out_tree": write_tree(graph.out_tree) if graph.out_tree else None,
        }

    def _node(self, node: Node) -> dict[str, Any]:
        result: dict[str, Any] = {
            "op": node.op,
            "args": {name: self._arg(arg) for name, arg in node.args.items() if name != "data"},
            "types": [str(v.type) for v in node.outputs],
        }
        if node.op == "constant":
            result["data"] = self._data(node)
        if node.bodies:
            result["bodies"] = [_Writer.graph(self, body) for body in node.bodies]
        for name in ("stream", "kernel", "stage"):
            field = getattr(node, name)
            if field not in (None, "", "run"):
                result[name] = self._arg(field)
        origin = {k: v for k, v in asdict(node.origin).items() if v}
        return result | ({"origin": origin} if origin else {})

    def _data(self, node: Node) -> Any:
        if self._arrays is not None and node.args["data"].is_released:
            self._count += 1
            return {"$array": f"{self._count - 1}.{node.args['name']}"}
        array = node.args["data"].array
        if node.output.type.shape == () or self._arrays is None:
            wide = array.astype(mx.float32) if array.dtype == mx.bfloat16 else array
            parts = np.array(wide)
            if array.dtype == mx.complex64:
                return [parts.real.tolist(), parts.imag.tolist()]
            return parts.tolist()
        key = f"{self._count}.{node.args['name']}"
        self._count += 1
        self._arrays[key] = array
        return {"$array": key}

    def _arg(self, arg: Any) -> Any:
        if isinstance(arg, Value):
            return {"$value": [self._places[arg.node], arg.index]}
        if isinstance(arg, tuple):
            return {"$tuple": [self._arg(a) for a in arg]}
        if arg is None or isinstance(arg, bool | int | str):
            return arg
        if isinstance(arg, float):
            return arg if np.isfinite(arg) else {"$float": str(arg)}
        if isinstance(arg, mx.Dtype):
            return {"$dtype": SHORT_NAMES[arg]}
        if isinstance(arg, slice):
            return {"$slice": [self._arg(e) for e in (arg.start, arg.stop, arg.step)]}
        if arg is Ellipsis:
            return {"$ellipsis": True}
        if isinstance(arg, Problem):
            return {"$problem": {k: self._arg(getattr(arg, k)) for k in Problem.__slots__}}
        if isinstance(arg, mx.Device | mx.DeviceType):
            return {"$device": "cpu" if mx.Device(arg.type if isinstance(arg, mx.Device) else arg)
                    == mx.Device(mx.cpu) else "gpu"}  # fmt: skip
        raise QGraphError(
            f"a {type(arg).__name__} cannot be written to a file",
            hint='name a device, "cpu" or "gpu", instead of a stream object',
        )


def _form(data: Any) -> Tree | None:
    return None if data is None else read_tree(data)


def _plain(data: Any) -> Any:
    """`data` if it is a name, a number or nothing; a list is written as what it stands for."""
    if data is None or isinstance(data, str | int | float):
        return data
    raise TypeError(f"{str(data)[:40]} where a name or a number stands")


def _text(data: Any) -> str:
    if isinstance(data, str):
        return data
    raise TypeError(f"{str(data)[:40]} where a text stands")


class _Reader:
    def __init__(self, arrays: Mapping[str, mx.array]) -> None:
        self._arrays = arrays
        self._nodes: list[Node] = []

    def whole(self, data: dict[str, Any]) -> Graph:
        graph = self.graph(data)
        for tree, values in ((graph.in_tree, graph.inputs), (graph.out_tree, graph.outputs)):
            if tree is not None and tree.count() != len(values):
                raise ValueError(f"a tree of {tree.count()} leaves for {len(values)} values")
        if (call := graph.in_tree) is not None and (
            call.kind != "tuple" or [part.kind for part in call.children] != ["tuple", "dict"]
        ):
            raise ValueError("arguments in another form than (args, keywords)")
        return graph

    def graph(self, data: dict[str, Any]) -> Graph:
        inputs = [self._add(self._input(d)).output for d in data["inputs"]]
        nodes = [self._add(self._node(d)) for d in data["nodes"]]
        return Graph(
            _text(data["name"]),
            inputs,
            nodes,
            [self.value(_inner("$value", v)) for v in data["outputs"]],
            in_tree=_form(data["in_tree"]),
            out_tree=_form(data["out_tree"]),
        )

    def _add(self, node: Node) -> Node:
        self._nodes.append(node)
        return node

    def _input(self, data: dict[str, Any]) -> Node:
        node = self._node(data)
        if set(node.args) != {"name", "parameter"} or len(node.outputs) != 1:
            raise ValueError("an input without a name or a type")
        _text(node.args["name"])
        return node

    def _node(self, data: dict[str, Any]) -> Node:
        origin = _origin(**data.get("origin", {}))
        types = [parse_type(text) for text in data["types"]]
        if data["op"] == "constant":
            array = self._array(data["data"], types[0])
            if type_of(array) != types[0]:
                raise ValueError(f"an array {type_of(array)} for a constant {types[0]}")
            return constant_value(array, _text(data["args"]["name"]), origin).node
        return Node(
            _text(data["op"]),
            {name: self._arg(arg) for name, arg in data["args"].items()},
            types,
            bodies=[self.graph(body) for body in data.get("bodies", ())],
            origin=origin,
            stream=self._arg(data.get("stream")),
            kernel=_text(data.get("kernel", "")),
            stage=data.get("stage", "run"),
        )

    def _array(self, data: Any, type: TensorType) -> mx.array:
        if not isinstance(data, dict):
            if type.dtype == mx.complex64:
                data = np.array(data[0]) + 1j * np.array(data[1])
            elif type.dtype == mx.uint64:
                data = np.array(data, np.uint64)  # of lists MLX takes signed integers only
            return mx.array(data, type.dtype).reshape(type.shape)
        if data["$array"] not in self._arrays:
            raise QGraphError(
                f"the array {data['$array']!r} of a constant is not there",
                hint="give from_json the arrays that to_json took out",
            )
        return self._arrays[data["$array"]]

    def _arg(self, data: Any) -> Any:
        if not isinstance(data, dict):
            return _plain(data)
        ((key, inner),) = data.items()
        return _READ[key](self, inner)

    def value(self, place: list[int]) -> Value:
        node, index = place
        if node < 0 or index < 0:
            raise IndexError(f"no value is {place}")
        return self._nodes[node].outputs[index]

    def tuple(self, items: list[Any]) -> tuple[Any, ...]:
        return tuple(self._arg(item) for item in items)

    def problem(self, fields: dict[str, Any]) -> Problem:
        return Problem(**{name: self._arg(field) for name, field in fields.items()})

    def slice(self, ends: list[Any]) -> slice:
        start, stop, step = self.tuple(ends)
        return slice(start, stop, step)


_READ: dict[str, Callable[[_Reader, Any], Any]] = {
    "$value": _Reader.value,
    "$tuple": _Reader.tuple,
    "$float": lambda _, text: float(text),
    "$dtype": lambda _, name: DTYPES[name],
    "$slice": _Reader.slice,
    "$ellipsis": lambda *_: Ellipsis,
    "$problem": _Reader.problem,
    "$device": lambda _, name: _text(name),
}


def _inner(key: str, data: dict[str, Any]) -> Any:
    """What stands in a dict under its one key."""
    ((found, inner),) = data.items()
    if found != key:
        raise ValueError(f"a {found} where a {key} stands")
    return inner


def _origin(file: str = "", line: int = 0, made_by: str = "", label: str = "") -> Origin:
    if type(line) is not int:
        raise TypeError(f"{line!r} is no line")
    return Origin(_text(file), line, _text(made_by), _text(label))


def parse_type(text: str) -> TensorType:
    """The type that prints as `text`.

    >>> parse_type("bf16[2,3]"), parse_type("i32[]")
    (bf16[2,3], i32[])
    """
    found = re.fullmatch(r"(\w+)\[((?:\d+(?:,\d+)*)?)\]", text)
    if not found or found[1] not in DTYPES:
        raise ValueError(f"{text!r} is no type")
    shape = tuple(int(size) for size in found[2].split(",") if size)
    if max(shape, default=0) >= 2**31:
        raise ValueError(f"{text!r} has more elements than MLX counts along an axis")
    return TensorType(shape, DTYPES[found[1]])
