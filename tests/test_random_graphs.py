"""Random graphs: optimized, as written, and in NumPy float64 they give the same.

Each seed makes one program of products with weights in all forms, element-wise ops, loops and
branches.  A failure prints the seed; `python -m pytest tests/test_random_graphs.py -k seed` with
QGRAPH_SEEDS=START:STOP runs others.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.ir import Graph, Node, Value
from qgraph.rewrite import setting
from tests import reference
from tests.arrays import to_numpy

K, ROWS = 64, 3
FORMATS = (("affine", 4, 32), ("affine", 8, 64), ("affine", 3, 32), ("mxfp4", 4, 32),
           ("mxfp8", 8, 32), ("nvfp4", 4, 16))  # fmt: skip
WEIGHTS = [mx.random.normal((K, K), key=mx.random.key(i)) / 8 for i in range(4)]
FIRST, LAST = map(int, os.environ.get("QGRAPH_SEEDS", "0:520").split(":"))
TOLERANCE = 2e-4
"""Of a whole program of float32 steps, some of them chained ten deep."""


@pytest.fixture(autouse=True)
def _not_compiled() -> Iterator[None]:
    """Without `mx.compile`: it would run a C++ compiler for every new fused kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


class Writer:
    """Writes a random program as a Python function of one tensor (ROWS, K)."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.packed = {
            (i, f): mx.quantize(w, f[2], f[1], mode=f[0])
            for i, w in enumerate(WEIGHTS)
            for f in FORMATS
        }

    def program(self, depth: int = 0) -> Callable[[Any], Any]:
        steps = [self.step(depth) for _ in range(self.rng.randint(2, 4))]

        def run(h: Any) -> Any:
            seen = [h]
            for step in steps:
                h = step(h, seen)
                seen.append(h)
            return h

        return run

    def step(self, depth: int) -> Callable[[Any, list[Any]], Any]:
        kinds = ["product"] * 5 + ["pointwise", "residual"]
        kinds += ["fori", "scan", "while", "cond"] if depth < 2 else []
        make: Callable[[int], Any] = getattr(self, self.rng.choice(kinds))
        result: Callable[[Any, list[Any]], Any] = make(depth)
        return result

    def product(self, depth: int) -> Callable[[Any, list[Any]], Any]:
        which, form = self.rng.randrange(len(WEIGHTS)), self.rng.choice(FORMATS)
        mode, bits, group = form
        parts, w = self.packed[which, form], WEIGHTS[which]
        settings = {"group_size": group, "bits": bits, "mode": mode}

        def dense() -> Any:
            return qg.dequantize(*parts[:2], *parts[2:], **settings, dtype=mx.float32)

        forms: list[Callable[[Any], Any]] = [
            lambda h: qg.quantized_matmul(h, w, **settings),
            lambda h: qg.quantized_matmul(h, *parts, **settings),
            lambda h: qg.quantized_matmul(h, w, transpose=False, **settings),
            lambda h: h @ dense().T,
            lambda h: h @ dense(),
            lambda h: (dense() @ h.T).T,
            lambda h: qg.addmm(h, h, dense().swapaxes(0, 1), alpha=0.5),
            lambda h: qg.einsum("mk,nk->mn", h, dense()),
            lambda h: qg.concatenate([h @ p.T for p in qg.split(dense(), 2)], axis=-1),
            lambda h: h @ qg.concatenate([dense()[:16], dense()[16:]]).T,
            lambda h: h @ dense().reshape(4, 16, K).reshape(K, K).T,
            lambda h: h @ qg.dequantize(*qg.quantize(qg.tensor(w) * 0.5, **settings), **settings,
                                        dtype=mx.float32).T,
            lambda h: h + qg.take(dense(), mx.array([1, 5, 1]), axis=0),
        ]  # fmt: skip
        chosen = self.rng.choice(forms)
        return lambda h, seen: qg.tanh(chosen(h))

    def pointwise(self, depth: int) -> Callable[[Any, list[Any]], Any]:
        forms: list[Callable[[Any], Any]] = [
            lambda h: qg.tanh(h * 1.5 + 0.25),
            lambda h: h * qg.sigmoid(h),
            lambda h: qg.maximum(h, 0.1 * h) + (1.0 - 1.0),
            lambda h: qg.where(h > 0, h, qg.square(h)),
            lambda h: h - qg.mean(h, axis=-1, keepdims=True),
        ]
        chosen = self.rng.choice(forms)
        return lambda h, seen: chosen(h)

    def residual(self, depth: int) -> Callable[[Any, list[Any]], Any]:
        back = self.rng.random()
        return lambda h, seen: (h + seen[int(back * len(seen))]) * 0.5

    def fori(self, depth: int) -> Callable[[Any, list[Any]], Any]:
        body, count = self.program(depth + 1), self.rng.randint(0, 3)
        return lambda h, seen: qg.fori_loop(0, count, lambda i, h: body(h), h)

    def scan(self, depth: int) -> Callable[[Any, list[Any]], Any]:
        body, reverse = self.program(depth + 1), self.rng.random() < 0.5
        xs = mx.random.normal((2, K), key=mx.random.key(9))

        def run(h: Any, seen: list[Any]) -> Any:
            h, ys = qg.scan(lambda c, x: (body(c + x * 0.1), c[0]), h, xs, reverse=reverse)
            return h + qg.sum(ys, axis=0) * 0.1

        return run

    def cond(self, depth: int) -> Callable[[Any, list[Any]], Any]:
        yes, no = self.program(depth + 1), self.program(depth + 1)
        return lambda h, seen: qg.cond(qg.sum(h[:, :8]) > 0, yes, no, h)


def _while(self: Writer, depth: int) -> Callable[[Any, list[Any]], Any]:
    body, count = self.program(depth + 1), self.rng.randint(0, 2)

    def run(h: Any, seen: list[Any]) -> Any:
        start = (h, mx.array(0))
        return qg.while_loop(lambda c: c[1] < count, lambda c: (body(c[0]), c[1] + 1), start)[0]

    return run


setattr(Writer, "while", _while)


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
            array = to_numpy(node.args["data"].array)
            return [array.astype(np.float64) if array.dtype == np.float32 else array]
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

    def getitem(self, node: Node, a: Any) -> Any:
        return a[node.args["index"]]


@pytest.mark.parametrize("block", range(FIRST, LAST, 20))
def test_seeds(block: int) -> None:
    x = mx.random.normal((ROWS, K), key=mx.random.key(1))
    changed = 0
    for seed in range(block, min(block + 20, LAST)):
        print("seed", seed)
        graph = qg.trace(Writer(seed).program(), x)
        plan = qg.optimize(graph, target="cpu")
        (expected,) = InNumPy().run(graph, [to_numpy(x).astype(np.float64)])
        for each in (graph, plan.graph):
            actual = to_numpy(qg.compile(each, passes=[], target="cpu")(x))
            error = reference.relative_error(actual, expected)
            assert error < TOLERANCE, f"seed {seed}: error {error:.2g}\n{graph}\n{plan.graph}"
        changed += plan.graph is not graph
        left = [n for _, n in plan.graph.walk() if n.op == "quantize" and n.stage == "run"]
        assert not left, f"seed {seed}: a quantize of a constant was not packed"
    assert changed
