"""What the tests of fusion share: formats, weights with their float64 values, and the checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg
from qgraph.compiler.plan import Plan
from qgraph.ir import Graph
from qgraph.passes import EliminateDeadCode, FuseQuantizedMatmul, RaiseDequantize, SinkDequantize
from tests.support import reference
from tests.support.arrays import to_numpy

Settings = dict[str, Any]

FORMATS: dict[str, Settings] = {
    "affine-2-128": {"group_size": 128, "bits": 2, "mode": "affine"},
    "affine-3-32": {"group_size": 32, "bits": 3, "mode": "affine"},
    "affine-4-32": {"group_size": 32, "bits": 4, "mode": "affine"},
    "affine-5-64": {"group_size": 64, "bits": 5, "mode": "affine"},
    "affine-6-32": {"group_size": 32, "bits": 6, "mode": "affine"},
    "affine-8-64": {"group_size": 64, "bits": 8, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
N, K = 96, 128
PASSES = [RaiseDequantize(), SinkDequantize(), FuseQuantizedMatmul(), EliminateDeadCode()]
COARSE = {mx.float32: 2e-6, mx.float16: 5e-3, mx.bfloat16: 4e-2}
"""Relative error of one product against float64, by the coarsest dtype in it."""


def random(*shape: int, seed: int = 0) -> mx.array:
    """Normal numbers, evaluated: names of constants follow the arrays."""
    array = mx.random.normal(shape, key=mx.random.key(seed))
    mx.eval(array)
    return array


def wide(array: mx.array) -> Any:
    """As NumPy has it, floats in float64."""
    values = to_numpy(array)
    return values.astype(np.float64) if values.dtype.kind == "f" else values


class Weight:
    """A packed weight, and its dense form in float64 by `tests/support/reference.py`."""

    def __init__(self, form: str, w: mx.array, dtype: mx.Dtype = mx.float32) -> None:
        self.settings = FORMATS[form]
        self.float = w.astype(dtype)
        self.parts = mx.quantize(self.float, **self.settings)
        mx.eval(self.float, *self.parts)
        arrays = [to_numpy(p) for p in self.parts]
        biases = arrays[2] if len(arrays) > 2 else None
        self.dense = reference.dequantize(*arrays[:2], biases, **self.settings)

    def dequantize(self, parts: Sequence[Any] | None = None, **options: Any) -> Any:
        """`qg.dequantize` of these parts, or of others in the same format."""
        return qg.dequantize(*(self.parts if parts is None else parts), **self.settings, **options)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Without `mx.compile`: it would run a C++ compiler for every new fused kernel."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def optimized(fn: Callable[..., Any], *args: Any, passes: Any = None, **options: Any) -> Plan:
    graph = qg.trace(fn, *args, name="f", **options)
    return qg.optimize(graph, target="cpu", passes=passes or PASSES)


def ops(graph: Graph) -> list[str]:
    return [n.op for _, n in graph.walk() if n.op != "constant"]


def reasons(plan: Plan) -> str:
    """Of all refusals."""
    return "\n".join(e.reason for e in plan.ledger() if e.decision == "refused")


def check(plan: Plan, args: Sequence[Any], expected: Any, tolerance: float = 2e-6) -> None:
    """Both graphs give what NumPy gives, and results of the same types."""
    assert [v.type for v in plan.graph.outputs] == [v.type for v in plan.source.outputs]
    wanted = expected if isinstance(expected, list | tuple) else [expected]
    for graph in (plan.source, plan.graph):
        with not_compiled():
            found = qg.tree.flatten(qg.compile(graph, passes=[], target="cpu")(*args))[0]
        for actual, value in zip(found, wanted, strict=True):
            assert reference.relative_error(to_numpy(actual), value) < tolerance
