"""A graph as it runs while its weights are fitted.

`Walk` carries a graph out on the float weights, or on those that were fitted, a node at a time, and
tells a listener what goes into each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ...ir.graph import Graph, Node, Value, map_values
from ...ir.ops import OPS
from ...kernels.streams import Streams
from ...quantization.fitted import Fitted
from ...runtime.interpret import Env, Interpreter
from ..rounding.formats import as_numpy
from ..weights import PRODUCTS, Prepared
from .attention import attention


@dataclass(frozen=True)
class Handle:
    """What stands for a packed weight, or rows of it, while a graph is walked.

    Attributes:
        index: which matrix of a stack it is, () for all of the weight; None for other rows.
        views: what was done to it, in order, on arrays with the weight's last axis.
        ids: what was looked up, if rows were.
    """

    name: str
    index: tuple[int, ...] | None = ()
    views: tuple[Callable[[mx.array], mx.array], ...] = ()
    ids: mx.array | None = None

    def __getitem__(self, i: int) -> Handle:
        """A slice, as a scan takes it."""
        return self.then(lambda w: w[i], None if self.index is None else (*self.index, i))

    def then(
        self,
        view: Callable[[mx.array], mx.array],
        index: tuple[int, ...] | None = None,
        ids: mx.array | None = None,
    ) -> Handle:
        return Handle(self.name, index, (*self.views, view), ids)


class Use(NamedTuple):
    """A product or a lookup as it is carried out.

    Attributes:
        x: what is multiplied; None for a lookup.
        experts: of a product with a stack, for each matrix product which of x's and which of the
            stack's matrices it takes.
        stack: the shape of the stack in front of its matrices.
    """

    handle: Handle
    node: Node
    x: mx.array | None
    experts: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None
    stack: tuple[int, ...] = ()


@dataclass
class Walk:
    """Carries a prepared graph out, a node at a time.

    Attributes:
        fitted: weights that stand in the place of the float ones, by name.
        listener: called for each product and lookup, before it is carried out.
        probe: called with each and its result, for what is to stand in the place of that.
        host: products run in NumPy, whose BLAS is many times as fast as MLX's on Linux CPUs.
    """

    found: Prepared
    fitted: Mapping[str, Fitted] = field(default_factory=dict)
    listener: Callable[[Use], None] | None = None
    probe: Callable[[Node, Env, mx.array], mx.array] | None = None
    host: bool = field(default_factory=lambda: mx.default_device() == mx.cpu)

    def __post_init__(self) -> None:
        self.interpreter = _Interpreter(self)
        self._arrays: tuple[Any, Any] = (None, None)

    def start(self, inputs: Sequence[mx.array]) -> Env:
        """The environment of a run: inputs, constants and handles."""
        graph = self.found.graph
        env: Env = dict(zip(graph.inputs, inputs, strict=True))
        return env

    def run(self, node: Node, env: Env) -> None:
        """Carry out one node."""
        self.interpreter.run(node, env)
        mx.eval([env[v] for v in node.outputs if isinstance(env[v], mx.array)])

    def weight(self, handle: Handle) -> mx.array:
        """The dense array that a handle stands for."""
        fitted = self.fitted.get(handle.name)
        array = self.found.weights[handle.name].array if fitted is None else fitted.dense()
        for view in handle.views:
            array = view(array)
        return array

    def use(self, node: Node, env: Env) -> Use | None:
        """The product or lookup that a node is, if it is one with a weight to fit."""
        handle = next((env[v] for v in node.inputs if isinstance(env.get(v), Handle)), None)
        if handle is None or not (node.op in PRODUCTS or node.op == "dequantize"):
            return None
        x = env[node.operand("x")] if node.op in PRODUCTS else None
        if x is None or node.op != "gather_qmm":
            return Use(handle, node, x)
        outer = self.found.weights[handle.name].shape[len(handle.index or ()) : -2]
        given = [node.value(name) for name in ("lhs_indices", "rhs_indices")]
        left, right = (
            np.arange(prod(shape)).reshape(shape) if value is None else np.array(env[value])
            for value, shape in zip(given, (x.shape[:-2], outer), strict=True)
        )
        left, right = np.broadcast_arrays(left, right)
        return Use(handle, node, x, (left.reshape(-1), right.reshape(-1)), outer)

    def on_host(self, handle: Handle) -> np.ndarray[Any, Any]:
        """The same in NumPy, float32, (rows, columns)."""
        key = handle.name, handle.name in self.fitted, handle.index
        if self._arrays[0] != key or handle.index is None:
            self._arrays = key, as_numpy(self.weight(handle))
        array: np.ndarray[Any, Any] = self._arrays[1]
        return array

    def multiply(self, x: mx.array, handle: Handle, transpose: bool) -> mx.array:
        """x times the weight's transpose, or times the weight."""
        if self.host and len(self.found.weights[handle.name].shape) - len(handle.index or ()) == 2:
            w = self.on_host(handle)
            rows = as_numpy(x).reshape(-1, x.shape[-1])
            y = rows @ (w.T if transpose else w)
            return mx.array(y.reshape(*x.shape[:-1], y.shape[-1])).astype(x.dtype)
        w_ = self.weight(handle).astype(x.dtype)
        return x @ (w_.swapaxes(-1, -2) if transpose else w_)


class _Interpreter(Interpreter):
    """Runs products and lookups on the dense weights behind handles."""

    def __init__(self, walk: Walk) -> None:
        super().__init__(Streams(mx.default_device()))
        self._walk = walk

    def _results(self, node: Node, env: Env) -> Sequence[Any]:
        if node.op == "quantize" and node.operand("w").node.op == "constant":
            name = node.operand("w").node.args["name"]
            if name in self._walk.found.weights:
                return [Handle(name)] * len(node.outputs)
        if self._walk.host and attends(node):
            args = {name: map_values(arg, env.__getitem__) for name, arg in node.args.items()}
            return [attention(args["q"], args["k"], args["v"], args["scale"], args.get("mask"))]
        handle = next((env[v] for v in node.inputs if isinstance(env[v], Handle)), None)
        return super()._results(node, env) if handle is None else [self._use(node, handle, env)]

    def _use(self, node: Node, handle: Handle, env: Env) -> Any:
        args = {name: map_values(arg, env.__getitem__) for name, arg in node.args.items()}
        if node.op not in PRODUCTS and node.op != "dequantize":
            return _viewed(node, handle, args)
        walk = self._walk
        if walk.listener is not None:
            use = walk.use(node, env)
            assert use is not None
            walk.listener(use)
        result = self._product(node, handle, args)
        return result if walk.probe is None else walk.probe(node, env, result)

    def _product(self, node: Node, handle: Handle, args: dict[str, Any]) -> mx.array:
        """Or rows that are looked up."""
        walk, x = self._walk, args.get("x")
        if node.op == "quantized_matmul":
            return walk.multiply(args["x"], handle, args.get("transpose", True))
        w = walk.weight(handle)
        if x is None:
            return w.astype(node.output.dtype)
        w = w.swapaxes(-1, -2) if args.get("transpose", True) else w
        indices: dict[str, Any] = {k: args.get(k) for k in ("lhs_indices", "rhs_indices")}
        return mx.gather_mm(x, w.astype(x.dtype), **indices)


def attends(node: Node) -> bool:
    """Is it attention that `attention` can carry out?"""
    return node.op == "fast.scaled_dot_product_attention" and node.args.get("sinks") is None


def _viewed(node: Node, handle: Handle, args: dict[str, Any]) -> Handle:
    """Rows laid out anew, or picked, of what a handle stands for."""
    first = next(name for name, arg in node.args.items() if node.inputs and arg is node.inputs[0])

    def view(array: mx.array) -> mx.array:
        given = {**args, first: array}
        if "shape" in given:
            given["shape"] = (*given["shape"][:-1], array.shape[-1])
        result: mx.array = OPS[node.op].call(given)
        return result

    ids = args.get("indices") if node.op == "take" else None
    return handle.then(view, None, ids)


def live_ranges(graph: Graph) -> dict[Value, int]:
    """The position of the last node that reads each value; outputs live to the end."""
    last: dict[Value, int] = {}
    for i, node in enumerate(graph.nodes):
        last.update(dict.fromkeys(node.inputs, i))
    last.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
    return last
