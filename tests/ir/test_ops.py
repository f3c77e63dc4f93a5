"""Every op of the table: traced it gives what MLX gives, and NumPy agrees where it has the op."""

from __future__ import annotations

import inspect
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.analysis.estimate import FORMULAS
from qgraph.ir.kinds import COSTS, TRAITS
from qgraph.ir.left_out import LEFT_OUT
from qgraph.ir.ops import ALIASES, OPS
from qgraph.kernels import Problem, kernel
from qgraph.tracing.functions import FUNCTIONS
from tests.support.arrays import to_numpy

KEY = mx.random.key(7)
X = mx.random.normal((4, 6), key=KEY)
Y = mx.random.uniform(0.1, 0.9, (4, 6), key=KEY)
BIG = mx.random.normal((128, 64), key=KEY)
CUBE = mx.random.normal((3, 4, 6), key=KEY)
I = mx.array([[3, 1, 2], [7, 5, 9]])  # noqa: E741
J = mx.array([[1, 2, 2], [3, 1, 4]])
B = mx.array([[True, False, True], [False, False, True]])
SPD = mx.array([[4.0, 1.0], [1.0, 3.0]])
Q = mx.quantize(BIG)
Q3 = mx.quantize(mx.random.normal((3, 128, 64), key=KEY))
NV = mx.quantize(BIG, mode="nvfp4")
IDS = mx.array([2, 0, 1], mx.uint32)
PROBLEM = Problem(2, 128, 64, mx.float32, "affine", 4, 64, scales_dtype=mx.float32)
HALVES = Problem(1, 128, 64, mx.float16, "affine", 4, 64, backend="cuda", arch="sm_90")
TILES = list(kernel("untiled+qmm").pack([Q[0], *(s.astype(mx.float16) for s in Q[1:])], HALVES))
EXPERTS = PROBLEM.replace(m=6, experts=3)

ONE = "abs arctan arcsinh ceil conjugate cos cosh degrees erf exp expm1 floor isfinite isinf isnan "
ONE += "isneginf isposinf logical_not negative positive radians sigmoid sign sin sinh square tan "
ONE += "tanh trunc"
INSIDE = "arccos arcsin arctanh erfinv log log10 log1p log2 reciprocal rsqrt sqrt"
TWO = "add arctan2 divide equal greater greater_equal less less_equal logaddexp maximum minimum "
TWO += "multiply not_equal subtract"

SAMPLES: dict[str, tuple[Any, ...]] = {
    **{name: (X,) for name in ONE.split()},
    **{name: (Y,) for name in INSIDE.split()},
    **{name: (X, Y) for name in TWO.split()},
    **{
        name: (I, J)
        for name in (
            "bitwise_and",
            "bitwise_or",
            "bitwise_xor",
            "left_shift",
            "right_shift",
            "divmod",
            "floor_divide",
            "remainder",
        )
    },
    **{name: (B, B[::-1]) for name in ("logical_and", "logical_or", "logical_xor")},
    **{
        name: (X,)
        for name in (
            "all",
            "any",
            "argmax",
            "argmin",
            "max",
            "min",
            "mean",
            "median",
            "minmax",
            "prod",
            "std",
            "sum",
            "var",
            "logsumexp",
            "count_nonzero",
            "cummax",
            "cummin",
            "cumprod",
            "cumsum",
            "logcumsumexp",
            "diff",
        )
    },
    **{
        name: (3,)
        for name in (
            "bartlett",
            "blackman",
            "hamming",
            "hanning",
            "identity",
            "eye",
            "tri",
            "random.key",
        )
    },
    **{
        f"at_{name}": (X, (slice(1, 3), 2), 1.5)
        for name in ("add", "divide", "maximum", "minimum", "multiply", "set", "subtract")
    },
    **{
        f"fft.{name}": (CUBE,)
        for name in (
            "fft",
            "fft2",
            "fftn",
            "fftshift",
            "ifft",
            "ifft2",
            "ifftn",
            "ifftshift",
            "irfft",
            "irfft2",
            "irfftn",
            "rfft",
            "rfft2",
            "rfftn",
        )
    },
    **{
        f"linalg.{name}": (SPD,)
        for name in (
            "cholesky",
            "cholesky_inv",
            "det",
            "eig",
            "eigh",
            "eigvals",
            "eigvalsh",
            "inv",
            "lu",
            "lu_factor",
            "pinv",
            "qr",
            "slogdet",
            "svd",
            "tri_inv",
            "norm",
        )
    },
    "linalg.solve": (SPD, mx.ones(SPD.shape[0])),
    "arccosh": (Y + 1,),
    "bitwise_invert": (I,),
    "power": (Y, X),
    "real": (X.astype(mx.complex64),),
    "imag": (X.astype(mx.complex64),),
    "astype": (X, mx.float16),
    "clip": (X, -0.5, 0.5),
    "from_fp8": (mx.to_fp8(X),),
    "to_fp8": (X,),
    "isclose": (X, X + 1e-7),
    "nan_to_num": (X,),
    "round": (X, 1),
    "stop_gradient": (X,),
    "view": (X, mx.uint32),
    "where": (X > 0, X, 0.0),
    "allclose": (X, X),
    "array_equal": (X, X),
    "softmax": (X, -1),
    "atleast_1d": (X,),
    "atleast_2d": (mx.array(1.0),),
    "atleast_3d": (X, Y),
    "broadcast_arrays": (X, Y[:1]),
    "broadcast_to": (X[:1], (4, 6)),
    "contiguous": (X.T,),
    "expand_dims": (X, 1),
    "flatten": (CUBE, 1, 2),
    "flip": (X, 0),
    "matrix_transpose": (CUBE,),
    "moveaxis": (CUBE, 0, 2),
    "reshape": (X, (3, 8)),
    "roll": (X, 2, 1),
    "squeeze": (X[None],),
    "swapaxes": (CUBE, 0, 1),
    "transpose": (CUBE, (2, 0, 1)),
    "unflatten": (X, 1, (2, 3)),
    "as_strided": (X, (3, 2), (2, 1), 1),
    "concatenate": ([X, Y], 1),
    "meshgrid": (X[0], Y[:, 0]),
    "pad": (X, 1),
    "repeat": (X, 2, 0),
    "split": (X, 2, 1),
    "stack": ([X, Y], 1),
    "tile": (X, (2, 1)),
    "unstack": (X,),
    "getitem": (CUBE, (slice(None), None, IDS, 1)),
    "keep": (X,),
    "replicate": (X,),
    "shard": (X, 0),
    "distributed.part": (X, 0, 2, 2),
    "distributed.join": (X, 0, 4, 1),
    "distributed.send": (X, 1),
    "distributed.recv": ((2, 3), mx.float32, 1),
    **{
        f"distributed.{name}": (X,)
        for name in ("all_gather", "all_max", "all_min", "all_sum", "sum_scatter")
    },
    "diag": (X[0],),
    "diagonal": (X,),
    "put_along_axis": (X, mx.array([[1], [0], [2], [3]]), mx.array(9.0), 1),
    "searchsorted": (mx.sort(X[0]), Y[0]),
    "slice": (X, mx.array([1]), (0,), (2, 6)),
    "slice_update": (X, Y[:1], mx.array([2]), (0,)),
    "take": (X, IDS, 0),
    "take_along_axis": (X, mx.array([[1], [0], [2], [3]]), 1),
    "tril": (X,),
    "triu": (X, 1),
    "argpartition": (X, 2),
    "argsort": (X,),
    "partition": (X, 2),
    "sort": (X, 0),
    "topk": (X, 2),
    "unique": (I.flatten(), 6),
    "addmm": (X[:, :3], X, mx.random.normal((6, 3), key=KEY)),
    "block_masked_mm": (
        BIG[:64],
        BIG.T[:, :64],
        32,
        None,
        mx.ones((2, 2), mx.bool_),
        mx.ones((2, 2), mx.bool_),
    ),
    "einsum": ("ij,kj->ik", X, Y),
    "gather_mm": (CUBE, mx.swapaxes(CUBE, 1, 2), None, IDS),
    "hadamard_transform": (BIG[:4],),
    "inner": (X, Y),
    "kron": (X[:2], Y[:2]),
    "matmul": (X, Y.T),
    "outer": (X[0], Y[1]),
    "segmented_mm": (X, X.T, mx.array([[0, 2], [2, 6]], mx.uint32)),
    "tensordot": (X, Y, [[1], [1]]),
    "vecdot": (X, Y),
    "conv1d": (CUBE, mx.random.normal((5, 3, 6), key=KEY)),
    "conv2d": (CUBE[None], mx.random.normal((5, 2, 2, 6), key=KEY)),
    "conv3d": (CUBE[None, None], mx.random.normal((5, 1, 2, 2, 6), key=KEY)),
    "conv_general": (CUBE, mx.random.normal((5, 3, 6), key=KEY), 2, 1),
    "conv_transpose1d": (CUBE, mx.random.normal((5, 3, 6), key=KEY)),
    "conv_transpose2d": (CUBE[None], mx.random.normal((5, 2, 2, 6), key=KEY)),
    "conv_transpose3d": (CUBE[None, None], mx.random.normal((5, 1, 2, 2, 6), key=KEY)),
    "convolve": (X[0], Y[0, :3]),
    "arange": (1, 7, 2),
    "full": ((2, 3), 1.5),
    "full_like": (X, 2.5),
    "linspace": (0, 1, 5),
    "ones": ((2, 3),),
    "ones_like": (X,),
    "zeros": ((2, 3),),
    "zeros_like": (X,),
    "dequantize": (*Q, 64, 4),
    "gather_qmm": (mx.ones((3, 2, 64)), *Q3, None, IDS, True, 64, 4),
    "gather_qqmm": (mx.ones((3, 2, 64)), mx.random.normal((3, 128, 64), key=KEY)),
    "qqmm": (mx.ones((2, 64)), NV[0], NV[1]),
    "quantize": (BIG, 64, 4),
    "quantized_matmul": (mx.ones((2, 64)), *Q, True, 64, 4),
    "pack_weight": (list(Q), PROBLEM, "dense"),
    "packed_matmul": (mx.ones((2, 64)), list(Q), PROBLEM, "qmm"),
    "packed_gather": (mx.ones((3, 2, 64)), list(Q3), EXPERTS, "sort+gather_qmm", None, IDS),
    "packed_rows": (TILES, IDS, HALVES, "untiled+qmm"),
    "decode_attention": (
        mx.random.normal((1, 2, 1, 64), key=KEY),
        *[mx.ones((1, 2, 5, 64))] * 2,
        mx.array(3),
        0.1,
    ),
    "merge_tail": (
        mx.ones((1, 1, 5, 64)),
        mx.zeros((1, 1, 3, 64)),
        mx.array([2, -1, -1], mx.int32),
    ),
    "fast.cross_entropy": (X, mx.array([0, 1, 2, 3])),
    "fast.layer_norm": (X, Y[0], Y[1], 1e-5),
    "fast.rms_norm": (X, Y[0], 1e-5),
    "random.bernoulli": (0.3, (5,), KEY),
    "random.categorical": (X, -1, None, None, KEY),
    "random.gumbel": ((5,), mx.float32, KEY),
    "random.laplace": ((5,), mx.float32, 0.0, 1.0, KEY),
    "random.multivariate_normal": (mx.zeros(2), SPD, (3,), mx.float32, KEY),
    "random.normal": ((5,), mx.float32, None, None, KEY),
    "random.permutation": (mx.arange(6), 0, KEY),
    "random.randint": (0, 9, (5,), mx.int32, KEY),
    "random.split": (KEY, 3),
    "random.truncated_normal": (-1.0, 1.0, (5,), mx.float32, KEY),
    "random.uniform": (0, 1, (5,), mx.float32, KEY),
    "linalg.cross": (X[:, :3], Y[:, :3]),
    "linalg.solve_triangular": (mx.tril(SPD), SPD),
}
KEYWORDS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "cached_attention": (
        (
            *[mx.random.normal((1, 4 * 64), key=KEY)] * 3,
            *[mx.ones((1, 1, 5, 64))] * 2,
            *[mx.array(3)] * 2,
        ),
        {
            "heads": ((2, 0, 256), (1, 128, 256), (1, 192, 256)),
            "rope": (64, False, 1e4, 1.0),
            "scale": 0.1,
        },
    ),
    "tail_attention": (
        (
            *[mx.random.normal((1, 4 * 64), key=KEY)] * 3,
            *[mx.ones((1, 1, 5, 64))] * 2,
            *[mx.zeros((1, 1, 3, 64))] * 2,
            mx.array([2, -1, -1], mx.int32),
            *[mx.array(3)] * 2,
        ),
        {
            "heads": ((2, 0, 256), (1, 128, 256), (1, 192, 256)),
            "rope": (64, False, 1e4, 1.0),
            "scale": 0.1,
        },
    ),
    "fast.rope": (
        (mx.random.normal((1, 2, 3, 8), key=KEY), 8),
        {"traditional": True, "base": 1e4, "scale": 1.0, "offset": 2},
    ),
    "fast.scaled_dot_product_attention": (
        (mx.random.normal((1, 2, 3, 8), key=KEY),) * 3,
        {"scale": 0.3, "mask": "causal"},
    ),
    "fast.gated_delta_update": (
        (
            mx.ones((1, 3, 2, 32)),
            mx.ones((1, 3, 2, 32)),
            mx.ones((1, 3, 2, 8)),
            mx.ones((1, 3, 2)) * 0.5,
            mx.ones((1, 3, 2)) * 0.5,
        ),
        {},
    ),
}
NOT_ON_CPU = {"qqmm", "gather_qqmm"}
"""MLX 0.32 says they are not yet implemented there; their types can still be inferred."""
NOT_NUMPYS = {
    "argpartition",
    "partition",
    "pad",
    "slice",
    "split",
    "meshgrid",
    "median",
    "unique",
    "all",
    "roll",
    "put_along_axis",
    "astype",
    "diff",
    "view",
    "broadcast_arrays",
    "searchsorted",
}


def call(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return KEYWORDS[name] if name in KEYWORDS else (SAMPLES[name], {})


def arrays(result: Any) -> list[mx.array]:
    return [result] if isinstance(result, mx.array) else list(result)


def test_every_op_has_a_sample() -> None:
    assert {*SAMPLES, *KEYWORDS} == set(OPS)


def test_every_op_says_what_it_costs() -> None:
    assert {op.name for op in OPS.values() if op.cost not in COSTS} == set()
    assert {op.name for op in OPS.values() if not op.traits <= set(TRAITS)} == set()
    assert {op.name for op in OPS.values() if op.cost == "own"} == set(FORMULAS)


@pytest.mark.parametrize("name", sorted(OPS))
def test_traced_gives_what_mlx_gives(name: str) -> None:
    args, kwargs = call(name)
    mx.random.seed(0)
    expected = arrays(OPS[name].fn(*args, **kwargs))
    leaves, form = qg.tree.flatten(args)
    given = [a for a in leaves if isinstance(a, mx.array)]

    def traced(*symbols: Any) -> Any:
        rest = iter(symbols)
        mixed = form.build([next(rest) if isinstance(a, mx.array) else a for a in leaves])
        return FUNCTIONS[name](*mixed, **kwargs)

    graph = qg.trace(traced, *given)
    assert [v.type.shape for v in graph.outputs] == [tuple(a.shape) for a in expected]
    assert [v.type.dtype for v in graph.outputs] == [a.dtype for a in expected]
    if name in NOT_ON_CPU:
        return
    program = qg.compile(graph, target="cpu")
    results = program(*given)
    for actual, wanted in zip(arrays(results), expected, strict=True):
        np.testing.assert_allclose(to_numpy(actual), to_numpy(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(SAMPLES) & set(dir(np)) - NOT_NUMPYS))
def test_numpy_agrees(name: str) -> None:
    args = SAMPLES[name]
    if any(isinstance(a, mx.Dtype) for a in args):
        pytest.skip("takes an MLX dtype")
    as_numpy = [
        [to_numpy(b) for b in a] if isinstance(a, list) and isinstance(a[0], mx.array)
        else to_numpy(a).astype(np.float64) if isinstance(a, mx.array) and a.dtype == mx.float32
        else to_numpy(a) if isinstance(a, mx.array) else a
        for a in args
    ]  # fmt: skip
    function = getattr(np, name)
    expected = function(*as_numpy)
    lazy = [qg.tensor(a) if isinstance(a, mx.array) else a for a in args]
    result = FUNCTIONS[name](*lazy)
    found = [
        t.eval() if isinstance(t, qg.Tensor) else t
        for t in (result if isinstance(result, list | tuple) else [result])
    ]
    wanted = list(expected) if isinstance(expected, tuple | list) else [expected]
    for actual, value in zip(found, wanted, strict=True):
        np.testing.assert_allclose(to_numpy(actual), value, rtol=2e-5, atol=2e-6)


def test_the_table_covers_mlx() -> None:
    """What `mlx.core` has and the table has not is left out for a stated reason."""
    functions = {
        name
        for name in dir(mx)
        if not name.startswith("_")
        and name[0].islower()
        and callable(getattr(mx, name))
        and not isinstance(getattr(mx, name), type)
        and _returns_arrays(getattr(mx, name))
    }
    missing = functions - set(OPS) - set(ALIASES) - set(LEFT_OUT)
    assert missing == set()


def _returns_arrays(function: Any) -> bool:
    first = (getattr(function, "__doc__", None) or "").split("\n", 1)[0]
    signature = getattr(function, "__nb_signature__", None)
    first = signature[0][0] if signature else first
    arrow = first.rpartition("->")[2]
    return "array" in arrow and "load(" not in first and "save_" not in first


def test_left_out_names_exist_and_have_reasons() -> None:
    assert all(hasattr(mx, name) and reason for name, reason in LEFT_OUT.items())
    assert not set(LEFT_OUT) & set(OPS)


OURS = ("local", "chosen kernels")


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.kind not in OURS])
def test_signatures_are_mlx_s(name: str) -> None:
    """Parameter names and order, where MLX documents them."""
    nb = getattr(OPS[name].fn, "__nb_signature__", None)
    text = nb[0][0] if nb else (OPS[name].fn.__doc__ or "").split("\n", 1)[0]
    if "(" not in text or name in ("arange", "bartlett", "hanning", "round"):
        pytest.skip("MLX gives no one signature")
    inside = text.partition("(")[2].rpartition("->")[0]
    ours = [p for p in OPS[name].signature.parameters if p != "self"]
    place = -1
    for parameter in ours:
        found = inside.find(f"{parameter}:", place + 1)
        found = inside.find(parameter, place + 1) if found < 0 else found
        if parameter in ("ddof",):
            continue
        assert found > place, f"{name}: {parameter} is not after {ours[: ours.index(parameter)]}"
        place = found


def test_functions_take_stream_and_show_signatures() -> None:
    signature = inspect.signature(qg.softmax)
    assert list(signature.parameters) == ["a", "axis", "precise", "stream"]
    assert qg.fast.rms_norm.__name__ == "rms_norm"
    graph = qg.trace(lambda x: qg.exp(x, stream="cpu"), qg.spec((2,)))
    assert graph.nodes[0].stream == "cpu"


def test_python_numbers_are_weak() -> None:
    x = qg.tensor(mx.ones((2,), mx.float16))
    i = qg.tensor(mx.ones((2,), mx.int8))
    for ours, theirs in [
        (x + 2.5, mx.ones((2,), mx.float16) + 2.5),
        (2 * i, 2 * mx.ones((2,), mx.int8)),
        (i + 0.5, mx.ones((2,), mx.int8) + 0.5),
        (i > 0, mx.ones((2,), mx.int8) > 0),
        (x + True, mx.ones((2,), mx.float16) + True),
        (qg.where(x > 0, x, 0), mx.where(mx.ones((2,)) > 0, mx.ones((2,), mx.float16), 0)),
    ]:
        assert ours.dtype == theirs.dtype
        assert mx.array_equal(ours.eval(), theirs)
