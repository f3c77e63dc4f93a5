"""Every op of the table: a region holds it, in every dtype, or says why it does not."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.ir.ops import OPS
from qgraph.runtime.regions.cpu.known import refusal
from qgraph.tracing.functions import FUNCTIONS
from tests.ir.test_ops import call
from tests.runtime.test_region_ops import agree
from tests.support.compiler import needs_compiler
from tests.support.region_cases import FLOATS, numbers

pytestmark = needs_compiler

NOT_HELD = {
    **{name: "complex" for name in OPS if name.startswith("fft.") and "shift" not in name},
    "real": "complex",
    "imag": "complex",
    **{name: "MLX's own routines" for name in (
        "linalg.cholesky", "linalg.cholesky_inv", "linalg.eig", "linalg.eigh", "linalg.eigvals",
        "linalg.eigvalsh", "linalg.inv", "linalg.lu", "linalg.lu_factor", "linalg.pinv",
        "linalg.qr", "linalg.solve", "linalg.solve_triangular", "linalg.svd", "linalg.tri_inv",
        "random.multivariate_normal")},
    **{name: "several processes" for name, op in OPS.items() if op.kind == "collective"},
    **{name: "a kernel of other targets, or of MLX's" for name in (
        "pack_weight", "packed_matmul", "packed_gather", "packed_rows", "cached_attention",
        "tail_attention", "merge_tail")},
    **{name: "not on CPUs in MLX either" for name in ("qqmm", "gather_qqmm")},
    **{name: "rare" for name in (
        "block_masked_mm", "segmented_mm", "hadamard_transform", "searchsorted", "to_fp8",
        "quantize", "divmod", "random.key")},
}  # fmt: skip
"""What stays with MLX, and in a word why."""

FLOAT32_ONLY = {"round", "from_fp8", "view", "power", "gather_mm"}
"""Not repeated in half precision: bits that mean something else there, rounding to steps, or what
MLX itself has in float32 alone."""


OF_A_RANK = {"distributed.part"}
"""The engine holds it, but form-regions leaves it alone: which part it is, only the run knows."""


def traced(name: str, dtype: mx.Dtype) -> tuple[Any, list[mx.array]]:
    """A function of the op's sample, and the sample's arrays with floats of a dtype."""
    args, kwargs = call(name)
    leaves, form = qg.tree.flatten(args)
    given = [
        a.astype(dtype) if a.dtype == mx.float32 else a for a in leaves if isinstance(a, mx.array)
    ]

    def function(*symbols: Any) -> Any:
        rest = iter(symbols)
        mixed = form.build([next(rest) if isinstance(a, mx.array) else a for a in leaves])
        return FUNCTIONS[name](*mixed, **kwargs)

    return function, given


def refusals(function: Any, given: list[mx.array]) -> list[str]:
    graph = qg.trace(function, *[qg.spec(a.shape, a.dtype) for a in given])
    return [why for node in graph.nodes if node.op != "constant" and (why := refusal(node))]


@pytest.mark.parametrize("name", sorted(OPS))
def test_an_op_is_held_or_named(name: str) -> None:
    assert bool(refusals(*traced(name, mx.float32))) == (name in NOT_HELD)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", sorted(set(OPS) - set(NOT_HELD) - OF_A_RANK))
def test_an_op_alone(name: str, dtype: mx.Dtype) -> None:
    if dtype != mx.float32 and name in FLOAT32_ONLY:
        pytest.skip("its sample is for float32")
    function, given = traced(name, dtype)
    if given:
        agree(function, *given)


WHOLE = (mx.bool_, mx.int8, mx.uint8, mx.int32, mx.uint32, mx.int64, mx.uint64)
OF_INTEGERS: dict[str, Any] = {
    **{name: getattr(qg, name) for name in (
        "sum", "prod", "mean", "max", "min", "all", "any", "argmax", "cumsum", "cumprod", "cummax",
        "cummin", "sort", "argsort", "isnan", "isfinite")},
    "sum of rows": lambda x: qg.sum(x, axis=-1),
    "sum of columns": lambda x: qg.sum(x, axis=0),
    "max of columns": lambda x: qg.max(x, axis=0),
    "any of columns": lambda x: qg.any(x, axis=0),
    "cumsum of columns": lambda x: qg.cumsum(x, axis=0, reverse=True),
    "cumsum, exclusive": lambda x: qg.cumsum(x, axis=1, inclusive=False),
    "taken": lambda x: x[:, mx.array([2, 0, -1])],
    "added": lambda x: x.at[mx.array([1, 1])].add(x[:1]),
    "largest": lambda x: x.at[mx.array([1, 1])].maximum(x[:1]),
    "or": lambda x: x + x[::-1],
}  # fmt: skip


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize("name", OF_INTEGERS)
def test_integers_and_booleans(name: str, dtype: mx.Dtype) -> None:
    agree(OF_INTEGERS[name], numbers(5, 7, dtype=dtype))
