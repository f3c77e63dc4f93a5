"""Kernels: each against float64, exactness as promised, names, decoding."""

import ast
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qgraph import kernels
from qgraph.ir import OPS
from qgraph.kernels import EXACT, Problem, candidates, carry_out, kernel, names_to_try, refusal
from qgraph.kernels.choice.measuring import random_operands
from qgraph.kernels.cpu.library import missing
from qgraph.kernels.matmul import host_blas
from qgraph.kernels.matmul.formats import as_numpy, decode, scale_values
from qgraph.kernels.matmul.host_blas import own_threads
from qgraph.kernels.streams import Streams
from qgraph.target import as_target
from tests.support import reference
from tests.support.arrays import to_numpy

CPU = as_target("cpu")
MODES = [("affine", 4, 64), ("affine", 8, 32), ("affine", 3, 64), ("mxfp4", 4, 32)]
MODES += [("nvfp4", 4, 16), ("mxfp8", 8, 32), ("affine", 2, 128), ("affine", 5, 32)]
MODES += [("affine", 6, 64)]
TOLERANCE = {mx.float32: 2e-6, mx.float16: 4e-3, mx.bfloat16: 4e-2}
EXTRA = ["pad8+qmm", "chunk4+qmm", "shard2+host-blas", "f32+host-blas", "shard2+f32+host-blas"]


def problem(m=3, n=48, k=256, dtype=mx.float32, mode=("affine", 4, 64), transpose=True):
    name, bits, group = mode
    scales = dtype if name == "affine" else mx.uint8
    return Problem(m, n, k, dtype, name, bits, group, transpose, scales, "cpu", CPU.arch, 2)


def run(name, p, x, parts, compiled=True):
    chosen = kernel(name)
    packed = chosen.pack(parts, p)
    mx.eval(packed)
    streams = Streams(CPU.device)

    def call(x):
        return carry_out(chosen, x, packed, p, streams)

    return (call if chosen.host or not compiled else mx.compile(call))(x)


def exactly(p, x, parts):
    """The product in float64 of the operands as they are."""
    arrays = [np.array(part) if part.dtype == mx.uint32 else to_numpy(part) for part in parts]
    w = reference.dequantize(*arrays, bits=p.bits, group_size=p.group_size, mode=p.mode)
    w = np.asarray(w, np.float64)
    return to_numpy(x).astype(np.float64) @ (w.T if p.transpose else w)


def error(got, want):
    return np.linalg.norm(to_numpy(got).astype(np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: f"{m[0]}{m[1]}")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("transpose", [True, False])
def test_every_candidate_is_the_product(mode, dtype, transpose):
    p = problem(dtype=dtype, mode=mode, n=256, k=256, transpose=transpose)
    x, parts = random_operands(p)
    want = exactly(p, x, parts)
    names = [*candidates(p, budget=1 << 40), *EXTRA]
    names = [name for name in names if kernel(name).applies(p) is None]
    assert {"qmm", "host-blas", "dense+host-blas", "pad8+qmm"} <= set(names)
    for name in names:
        y = run(name, p, x, parts)
        assert y.dtype == p.out_dtype
        assert y.shape == (p.m, p.n)
        assert error(y, want) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES[:2] + MODES[3:6], ids=lambda m: f"{m[0]}{m[1]}")
def test_exact_kernels_give_the_bits_of_quantized_matmul(dtype, mode):
    p = problem(m=11, n=40, dtype=dtype, mode=mode)
    x, parts = random_operands(p)
    plain = mx.quantized_matmul(x, *parts, **p.settings)
    names = [name for name in [*names_to_try(p), *EXTRA] if kernel(name).applies(p) is None]
    exact = [name for name in names if kernel(name).contract(p) == EXACT]
    assert {"qmm", "pad8+qmm", "chunk4+qmm"} <= set(exact)
    for name in exact:
        assert mx.array_equal(run(name, p, x, parts), plain).item(), name


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_float32_compute_is_closer_than_plain(dtype):
    p = problem(m=4, k=1024, dtype=dtype)
    x, parts = random_operands(p)
    want = exactly(p, x, parts)
    plain = error(run("qmm", p, x, parts), want)
    assert error(run("shard2+f32+qmm", p, x, parts), want) <= plain
    assert error(run("host-blas", p, x, parts), want) <= plain


def test_x_of_float16_and_scales_of_float32():
    p = problem(dtype=mx.float16).replace(scales_dtype=mx.float32)
    x, parts = random_operands(p)
    want = exactly(p, x, parts)
    plain = mx.quantized_matmul(x, *parts, **p.settings)
    for name in candidates(p, budget=1 << 40):
        y = run(name, p, x, parts)
        assert y.dtype == plain.dtype == mx.float32
        assert error(y, want) < 1e-5, name


@pytest.mark.parametrize(("m", "n", "k"), [(1, 4, 64), (10, 9, 96), (14, 1500, 64), (130, 24, 512)])
def test_odd_sizes(m, n, k):
    p = problem(m=m, n=n, k=k, mode=("affine", 4, 32))
    x, parts = random_operands(p)
    want = exactly(p, x, parts)
    for name in candidates(p, budget=1 << 40):
        assert error(run(name, p, x, parts), want) < 2e-6, name


def test_leading_axes_are_flattened():
    p = problem(m=6)
    x, parts = random_operands(p)
    whole = run("qmm", p, x, parts)
    batched = run("qmm", p, x.reshape(2, 3, p.k), parts)
    assert batched.shape == (2, 3, p.n)
    assert mx.array_equal(batched.reshape(6, p.n), whole).item()


def test_shards_are_rows_and_only_rows():
    p = problem(n=100)
    _, parts = random_operands(p)
    packed = kernel("shard2+qmm").pack(parts, p)
    assert [part.shape[0] for part in packed] == [48] * 3 + [52] * 3
    assert mx.array_equal(mx.concatenate([packed[0], packed[3]]), parts[0]).item()


def test_plain_can_stand_on_a_shared_packed_copy():
    p = problem(m=2, dtype=mx.bfloat16)
    x, parts = random_operands(p)
    packed = kernel("shard2+f32+qmm").pack(parts, p)
    streams = Streams(CPU.device)
    y = carry_out(kernel("shard2+f32+host-blas"), x, packed, p, streams)
    assert error(y, exactly(p, x, parts)) < TOLERANCE[mx.bfloat16]


def test_refusals_say_why():
    p = problem()
    assert "float32 already" in refusal("f32+qmm", p)
    assert "budget is 0" in refusal("dense+host-blas", p)
    assert refusal("dense+host-blas", p, budget=p.weights * 4) is None
    assert "multiple of 8 already" in refusal("pad8+qmm", p.replace(m=16))
    assert "GPU" in refusal("host-blas", p.replace(backend="cuda"))
    assert "cores" in refusal("shard4+qmm", p)
    assert "not exact" in refusal("host-blas", p, exact=True)
    assert candidates(p, exact=True) == ["qmm", "shard2+qmm"]


def test_extra_bytes_are_those_kept():
    p = problem(dtype=mx.bfloat16)
    _, parts = random_operands(p)
    kept = sum(part.nbytes for part in kernel("shard2+f32+qmm").pack(parts, p))
    given = sum(part.nbytes for part in parts)
    assert p.packed_bytes == given
    assert kernel("shard2+f32+qmm").extra_bytes(p) == kept - given
    dense = kernel("dense+host-blas")
    assert dense.extra_bytes(p) == dense.pack(parts, p)[0].nbytes


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
@pytest.mark.parametrize(("mode", "scales"), [("affine", None), ("mxfp4", mx.uint8)])
def test_the_dtype_of_scales_may_be_left_out(dtype, mode, scales):
    short = Problem(1, 64, 64, dtype, mode, 4, 32)
    whole = short.replace(scales_dtype=scales or dtype)
    assert short == whole
    assert str(short) == str(whole)
    assert short.out_dtype == dtype
    assert names_to_try(short) == names_to_try(whole)
    for backend in ("cpu", "cuda"):
        assert candidates(short.replace(backend=backend, arch="sm_90"))[0] == "qmm"


@pytest.mark.parametrize("name", ["nothing", "f32", "pad+qmm", "shard0+qmm", "qmm+f32", "f16+qmm"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="no kernel is called"):
        kernel(name)


def test_a_choice_asks_kernels_and_reads_no_names():
    package = Path(kernels.__file__).parent
    passes = package.parent / "passes"
    names = {cls.name for cls in kernels.KERNELS if cls.name} - set(OPS)
    for path in [*(package / "choice").glob("*.py"), passes / "choose_kernel.py"]:
        tree = ast.parse(path.read_text())
        constants = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert not names & constants, path.name


def test_cuda_padding_is_exact_only_within_one_kernel_of_mlx():
    p = problem(m=3, n=256, k=256, dtype=mx.bfloat16).replace(backend="cuda")
    assert "float32" in kernel("pad8+qmm").contract(p)
    assert kernel("pad16+qmm").contract(p.replace(m=9)) == EXACT


@pytest.mark.parametrize("mode", MODES, ids=lambda m: f"{m[0]}{m[1]}")
def test_decoding_is_that_of_mlx(mode):
    p = problem(mode=mode)
    _, parts = random_operands(p)
    w, scales, *biases = map(as_numpy, parts)
    dense = decode(w, scale_values(scales, p.mode), biases[0] if biases else None, p.mode, p.bits)
    assert np.array_equal(dense, mx.dequantize(*parts, **p.settings, dtype=mx.float32))


def test_nan_scales_decode_to_nan():
    assert np.isnan(scale_values(np.array([255], np.uint8), "mxfp4")).all()
    assert np.isnan(scale_values(np.array([127], np.uint8), "nvfp4")).all()


def test_arrays_are_seen_without_a_copy():
    array = mx.arange(8, dtype=mx.float32)
    view = as_numpy(array)
    assert not view.flags.owndata
    assert view.__array_interface__["data"][0] == as_numpy(array).__array_interface__["data"][0]


def test_blas_has_its_threads_back():
    from threadpoolctl import threadpool_info

    before = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    with own_threads(2):
        inside = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        assert set(inside) == {1}
    after = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    assert after == before


@pytest.mark.parametrize("name", ["host-blas", "simd"])
def test_packed_parts_in_any_order_of_memory(name: str) -> None:
    if name == "simd" and missing():
        pytest.skip(str(missing()))
    problem = Problem(3, 64, 128, mx.float32, "affine", 4, 64)
    x, parts = random_operands(problem)
    across = [mx.contiguous(part.T).T for part in parts]
    mx.eval(across)
    run = kernel(name)
    want, got = (run.bind(p, problem, Streams(mx.Device(mx.cpu, 0)))(x) for p in (parts, across))
    assert mx.array_equal(want, got)


def test_after_a_fork_no_thread_holds_the_lock_of_blas() -> None:
    with host_blas._one_at_a_time:
        child = os.fork()
        if child == 0:
            os._exit(int(host_blas._one_at_a_time.locked()))
    assert os.waitpid(child, 0)[1] == 0
    assert not host_blas._one_at_a_time.locked()
