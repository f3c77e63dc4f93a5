"""Every op that a region holds: native form against body against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.passes import FormRegions
from tests.support import region_cases as cases
from tests.support.arrays import to_numpy
from tests.support.compiler import needs_compiler
from tests.support.fusion import not_compiled

pytestmark = needs_compiler

EPSILON = {mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7}


def as_list(results: Any) -> list[mx.array]:
    return list(results) if isinstance(results, tuple | list) else [results]


def both_ways(function: Any, *inputs: mx.array) -> list[tuple[mx.array, mx.array]]:
    """Pairs of what a region's native form and its body give; all of the graph is the region."""
    graph = qg.trace(function, *[qg.spec(x.shape, x.dtype) for x in inputs])
    native = qg.compile(graph, target="cpu", passes=[FormRegions(everywhere=True)])
    ops = [n.op for n in native.plan.graph.nodes if n.stage == "run" and n.op != "constant"]
    assert ops == ["region"], native.plan.ledger()
    step = native.executables[0].lowered.steps[0]
    assert step.native is not None
    with not_compiled():
        body = qg.compile(graph, target="cpu", passes=[])
        theirs = as_list(body(*inputs))
        mx.eval(theirs)
    pairs = list(zip(as_list(native(*inputs)), theirs, strict=True))
    for ours, other in pairs:
        assert (ours.shape, ours.dtype) == (other.shape, other.dtype)
    return pairs


def error(found: mx.array, exact: np.ndarray) -> float:
    """The largest difference, relative to the largest number."""
    numbers = np.nan_to_num(to_numpy(found).astype(np.float64), posinf=1e30, neginf=-1e30)
    wanted = np.nan_to_num(exact.astype(np.float64), posinf=1e30, neginf=-1e30)
    return float(np.abs(numbers - wanted).max(initial=0) / (np.abs(wanted).max(initial=0) + 1e-30))


def agree(function: Any, *inputs: mx.array, exact: np.ndarray | None = None) -> None:
    """A region's native form is as near to float64 as its body is, or nearer."""
    for ours, theirs in both_ways(function, *inputs):
        if not mx.issubdtype(ours.dtype, mx.floating):
            np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))
            continue
        wanted = to_numpy(theirs) if exact is None else exact
        allowed = 4 * EPSILON[ours.dtype] + (2 * error(theirs, exact) if exact is not None else 0)
        assert error(ours, wanted) <= allowed
        nans = np.isnan(to_numpy(ours))
        np.testing.assert_array_equal(nans, np.isnan(to_numpy(theirs)))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("name", cases.POINTWISE)
def test_pointwise(name: str, dtype: mx.Dtype) -> None:
    op, make, count = cases.POINTWISE[name]
    inputs = [make(5, 37, seed=i, dtype=dtype) for i in range(count)]
    function = getattr(np, {"sigmoid": "", "rsqrt": "", "erf": "", "erfinv": ""}.get(op, op), None)
    exact = None
    if function is not None and op not in ("round",):
        exact = np.asarray(function(*[to_numpy(x).astype(np.float64) for x in inputs]))
    agree(getattr(qg, op), *inputs, exact=exact)


@pytest.mark.parametrize("dtype", cases.INTEGERS, ids=str)
@pytest.mark.parametrize("name", cases.BINARY + cases.COMPARISONS[:6] + cases.BITS)
def test_integers(name: str, dtype: mx.Dtype) -> None:
    inputs = [cases.numbers(3, 21, seed=i, dtype=dtype) for i in range(2)]
    agree(getattr(qg, name), *inputs)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("name", cases.SHAPED)
def test_shaped(name: str, dtype: mx.Dtype) -> None:
    agree(cases.SHAPED[name], cases.numbers(3, 6, 8, dtype=dtype))
