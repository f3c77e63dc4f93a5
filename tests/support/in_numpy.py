"""A graph as written, run by NumPy in float64, with quantization by `reference.py` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qgraph.ir import Graph, Node, Value, map_values
from qgraph.ir.ops import setting
from tests.support import reference
from tests.support.fusion import wide


class InNumPy:
    """Runs a graph as written in float64, quantization by the published formats."""

    def run(self, graph: Graph, inputs: Sequence[Any]) -> list[Any]:
        env: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))
        for node in graph.nodes:
            results = self.node(node, env)
            env.update(zip(node.outputs, results, strict=True))
        return [env[v] for v in graph.outputs]

    def node(self, node: Node, env: dict[Value, Any]) -> list[Any]:
        if node.op == "constant":
            return [wide(node.args["data"].array)]
        if node.bodies:
            return self.control(node, env)
        inputs = [env[v] for v in node.inputs]
        function = getattr(self, node.op, None)
        if function is not None:
            result = function(node, *inputs)
        else:
            names = {"transpose": "transpose", "power": "power"}
            attrs = {k: v for k, v in node.attrs.items() if k in ("axis", "keepdims")}
            result = getattr(np, names.get(node.op, node.op))(*inputs, **attrs)
        return list(result) if isinstance(result, list | tuple) else [result]

    def control(self, node: Node, env: dict[Value, Any]) -> list[Any]:
        def values(name: str) -> list[Any]:
            return [env[v] for v in node.args.get(name, ())]

        carried = values("carried")
        if node.op == "fori_loop":
            for i in range(node.args["lower"], node.args["upper"]):
                carried = self.run(node.bodies[0], [i, *carried, *values("invariants")])
            return carried
        if node.op == "while_loop":
            test, body = node.bodies
            while self.run(test, [*carried, *values("cond_invariants")])[0]:
                carried = self.run(body, [*carried, *values("invariants")])
            return carried
        if node.op == "cond":
            which = 0 if env[node.operand("pred")] else 1
            extra = values(("true_invariants", "false_invariants")[which])
            return self.run(node.bodies[which], [*carried, *extra])
        count, ys = node.args["length"], []
        for i in reversed(range(count)) if node.args["reverse"] else range(count):
            slices = [x[i] for x in values("xs")]
            results = self.run(node.bodies[0], [*carried, *slices, *values("invariants")])
            carried, y = results[: len(carried)], results[len(carried) :]
            ys.append(y)
        if node.args["reverse"]:
            ys.reverse()
        return [*carried, *(np.stack(column) for column in zip(*ys, strict=True))]

    def quantize(self, node: Node, w: Any) -> list[Any]:
        made = reference.quantize(w, *self._settings(node), dtype="float32")
        return [p for p in (made.w_q, made.scales, made.biases) if p is not None]

    def _settings(self, node: Node) -> tuple[int, int, str]:
        return node.args["group_size"], node.args["bits"], setting(node, "mode")

    def dequantize(self, node: Node, w: Any, s: Any, b: Any = None) -> Any:
        return reference.dequantize(w, s, b, *self._settings(node))

    def quantized_matmul(self, node: Node, x: Any, w: Any, s: Any, b: Any = None) -> Any:
        return reference.quantized_matmul(
            x, w, s, b, setting(node, "transpose"), *self._settings(node)
        )

    def transpose(self, node: Node, a: Any) -> Any:
        return np.transpose(a, setting(node, "axes"))

    def swapaxes(self, node: Node, a: Any) -> Any:
        return np.swapaxes(a, node.args["axis1"], node.args["axis2"])

    def reshape(self, node: Node, a: Any) -> Any:
        return np.reshape(a, node.output.shape)

    def astype(self, node: Node, a: Any) -> Any:
        return a

    def einsum(self, node: Node, *operands: Any) -> Any:
        return np.einsum(node.args["subscripts"], *operands)

    def tensordot(self, node: Node, a: Any, b: Any) -> Any:
        return np.tensordot(a, b, setting(node, "axes"))

    def gather_mm(self, node: Node, a: Any, b: Any, rhs_indices: Any) -> Any:
        return a @ b[rhs_indices]

    def zeros(self, node: Node) -> Any:
        return np.zeros(node.output.shape)

    def addmm(self, node: Node, c: Any, a: Any, b: Any) -> Any:
        return setting(node, "beta") * c + setting(node, "alpha") * (a @ b)

    def sigmoid(self, node: Node, a: Any) -> Any:
        return 1 / (1 + np.exp(-a))

    def concatenate(self, node: Node, *arrays: Any) -> Any:
        return np.concatenate(arrays, setting(node, "axis"))

    def split(self, node: Node, a: Any) -> Any:
        return np.split(a, node.args["indices_or_sections"], setting(node, "axis"))

    def take(self, node: Node, a: Any, i: Any) -> Any:
        return np.take(a, i, node.args["axis"])

    def getitem(self, node: Node, a: Any, *indices: Any) -> Any:
        given = iter(indices)
        return a[map_values(node.args["index"], lambda _: next(given))]
