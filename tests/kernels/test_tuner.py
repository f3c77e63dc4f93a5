"""The tuner: where a choice comes from, the cache, the cost model."""

import json
import math
import warnings

import mlx.core as mx
import pytest

from qgraph.kernels import Problem, candidates, kernel
from qgraph.kernels.choice import cost
from qgraph.kernels.choice.cache import Cache, _digest, device_key
from qgraph.kernels.choice.cost import CostTable, problem_key
from qgraph.kernels.choice.measuring import measure
from qgraph.kernels.choice.tuner import choose, estimate
from qgraph.target import as_target

CPU = as_target("cpu")


def problem(m=1, n=64, k=128, **changes):
    p = Problem(m, n, k, mx.float32, "affine", 4, 64, True, mx.float32, "cpu", "toy", 2)
    return p.replace(**changes)


def table(*rows):
    """Of (problem, microseconds by kernel)."""
    return CostTable.of(
        {
            "machine": {"backend": "cpu", "arch": "toy", "cores": 2},
            "rows": [
                {
                    "problem": problem_key(p), "m": p.m, "n": p.n, "k": p.k, "mode": p.mode,
                    "bits": p.bits, "dtype": "f32", "transpose": p.transpose, "us": us,
                }
                for p, us in rows
            ],
        }
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "folder" / "kernels.json")


def test_cache_is_asked_first(cache):
    p, names = problem(), ["qmm", "shard2+qmm"]
    known = table((p, {"qmm": 9, "shard2+qmm": 5}))
    assert choose(p, names=names, cache=cache, table=known).source == "table"
    cache.put(p, {"qmm": 3.0, "shard2+qmm": 4.0})
    choice = choose(p, names=names, cache=cache, table=known)
    assert (choice.kernel, choice.source, choice.estimate_us) == ("qmm", "cache", 3.0)
    assert choice.others == (("shard2+qmm", 4.0),)


def test_cache_survives_the_process_and_keeps_others(cache):
    cache.put(problem(1), {"qmm": 1.0})
    other = Cache(cache.path)
    other.put(problem(2), {"qmm": 2.0})
    cache.put(problem(1), {"host-blas": 3.0})
    assert Cache(cache.path).get(problem(1)) == {"qmm": 1.0, "host-blas": 3.0}
    assert Cache(cache.path).get(problem(2)) == {"qmm": 2.0}


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "\x00\xff", '{"format": 99}', '{"format": 2, "devices": [1]}', "null", "[" * 99999],
    ids=range(7),
)
def test_unreadable_cache_is_ignored_with_a_word(tmp_path, text):
    path = tmp_path / "kernels.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="is ignored"):
        cache = Cache(path)
    assert cache.get(problem()) == {}
    with pytest.warns(UserWarning, match="is ignored"):
        cache.put(problem(), {"qmm": 1.0})
    assert json.loads(path.read_text())["format"] == 2


def test_a_cache_that_was_damaged_is_ignored_and_made_again(cache):
    """Every byte in turn, in steps: a time that was changed would choose another kernel."""
    p = problem()
    cache.put(p, {"qmm": 12.5, "host-blas": 3.25})
    whole = cache.path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        cache.path.write_bytes(damaged)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            assert Cache(cache.path).get(p) in ({}, {"qmm": 12.5, "host-blas": 3.25})
    with pytest.warns(UserWarning, match="is ignored"):
        Cache(cache.path)
    with pytest.warns(UserWarning, match="is ignored"):
        cache.put(p, {"qmm": 1.0})
    assert Cache(cache.path).get(p) == {"qmm": 1.0}


def test_other_devices_and_nonsense_times_are_not_used(cache):
    p = problem()
    cache.put(p, {"qmm": 1.0, "host-blas": -1.0, "dense": "fast"})
    assert cache.get(p) == {"qmm": 1.0}
    assert cache.get(p.replace(cores=4)) == {}
    versions = device_key(p).split(", ")[-3:]
    assert [word.split()[0] for word in versions] == ["mlx", "numpy", "qgraph"]
    data = json.loads(cache.path.read_text())
    data["devices"] = {"another machine": data["devices"][device_key(p)]}
    data["sha256"] = _digest(data["devices"])
    cache.path.write_text(json.dumps(data))
    assert Cache(cache.path).get(p) == {}


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not saved"):
        Cache(tmp_path / "file" / "kernels.json").put(problem(), {"qmm": 1.0})


def test_measuring_fills_the_cache(cache):
    p = problem(arch=CPU.arch, cores=CPU.cores)
    choice = choose(p, names=["qmm", "host-blas"], tune=True, cache=cache)
    assert choice.source == "measured"
    assert set(cache.get(p)) == {"qmm", "host-blas"}
    assert cache.get(p)[choice.kernel] == min(cache.get(p).values())
    assert choose(p, names=["qmm", "host-blas"], tune=True, cache=cache).source == "cache"


def test_measure_times_every_kernel_it_is_given():
    timings = measure(problem(), ["qmm", "dense", "host-blas"], repeats=2, target=CPU)
    assert set(timings) == {"qmm", "dense", "host-blas"}
    assert all(t.median > 0 for t in timings.values())


def test_model_interpolates_powers_exactly(cache):
    rows = [
        (problem(m, n=n), {"qmm": 2.0 * m * n, "host-blas": 500.0 * n**0.5})
        for m in (1, 4, 64)
        for n in (64, 1024)
    ]
    known = table(*rows)
    p = problem(m=16, n=256)
    assert kernel("qmm").estimate(p, known) == pytest.approx(2.0 * 16 * 256)
    assert kernel("host-blas").estimate(p, known) == pytest.approx(500.0 * 16)
    beyond = problem(m=128, n=4096)
    assert kernel("qmm").estimate(beyond, known) == pytest.approx(2.0 * 128 * 4096)
    few = choose(problem(1, n=256), names=["qmm", "host-blas"], cache=cache, table=known)
    many = choose(p, names=["qmm", "host-blas"], cache=cache, table=known)
    assert [(few.kernel, few.source), (many.kernel, many.source)] == [
        ("qmm", "model"),
        ("host-blas", "model"),
    ]


def test_shards_of_another_number_of_cores_are_derived(cache):
    known = table((problem(), {"qmm": 1000.0}))
    p = problem(cores=8)
    assert known.measured("qmm", p) is None
    assert kernel("shard8+qmm").estimate(p, known) == pytest.approx(1000 / 8 + 30)


def test_half_precision_in_float32_is_read_off_the_float32_rows():
    known = table((problem(), {"qmm": 100.0, "host-blas": 70.0}))
    half = problem(dtype=mx.float16, scales_dtype=mx.float16)
    assert kernel("f32+qmm").estimate(half, known) == pytest.approx(100)
    assert kernel("host-blas").estimate(half, known) == pytest.approx(70)


def test_unknown_target_runs_the_plain_kernel(cache):
    choice = choose(problem(arch="unheard of"), cache=cache)
    assert (choice.kernel, choice.source) == ("qmm", "default")
    assert math.isnan(choice.estimate_us)


def test_exactness_and_budget_limit_the_choice(cache):
    everything = {"qmm": 9.0, "shard2+qmm": 5.0, "host-blas": 3.0, "dense+host-blas": 1.0}
    everything |= dict.fromkeys(["dequantize+matmul", "shard2+dequantize+matmul"], 20.0)
    everything |= dict.fromkeys(["dense", "shard2+dense"], 30.0)
    p = problem()
    known = table((p, everything))
    picks = [
        choose(p, cache=cache, table=known, **options).kernel
        for options in ({"exact": True}, {}, {"budget": p.weights * 4})
    ]
    assert picks == ["shard2+qmm", "host-blas", "dense+host-blas"]


@pytest.mark.parametrize("m", [3, 4])
def test_hopper_decodes_each_weight_once_for_few_rows(cache, m):
    p = Problem(
        m, 14336, 4096, mx.bfloat16, "affine", 4, 64, True, mx.bfloat16, "cuda", "sm_90", 16
    )
    choice = choose(p, cache=cache)
    assert choice.kernel == "tiled"
    assert estimate("qmm", p) > 2 * choice.estimate_us
    odd = choose(p.replace(n=14335), cache=cache)
    assert (odd.kernel, odd.source) == ("tiled", "model")
    fp4 = choose(p.replace(mode="mxfp4", group_size=32, scales_dtype=mx.uint8), cache=cache)
    assert fp4.kernel == "tiled"
    assert "mma" not in candidates(p)  # it would need a second copy of the weight
    assert "mma" in candidates(p.replace(arch="sm_80"))
    assert kernel("qmm").modelled(p) > 1.5 * kernel("pad8+qmm").modelled(p)


def test_gpus_of_one_architecture_are_told_apart_by_their_names(monkeypatch):
    p = Problem(8, 14336, 4096, mx.bfloat16, "affine", 4, 64, backend="cuda")
    shipped = cost.shipped_tables()
    h200 = CostTable({"backend": "cuda", "arch": "sm_90 NVIDIA H200"}, {}, {})
    monkeypatch.setattr(cost, "shipped_tables", lambda: {**shipped, "cuda_h200": h200})
    assert cost.table_for(p.replace(arch="sm_90 NVIDIA H200")) is h200
    for arch in ("sm_90", "sm_90 NVIDIA H20", "sm_90 NVIDIA H100 80GB HBM3"):
        assert cost.table_for(p.replace(arch=arch)) is shipped["cuda_h100"]
    for arch in ("sm_120 NVIDIA H200", ""):
        assert not cost.table_for(p.replace(arch=arch)).exact
    slow, fast = (kernel("tiled").modelled(p.replace(arch=f"sm_90 {n}")) for n in ("H100", "H200"))
    assert fast < slow


def test_prompts_of_many_lengths_share_measurements(cache):
    cache.put(problem(64), {"qmm": 9.0, "host-blas": 3.0})
    names = ["qmm", "host-blas"]
    for m in (33, 50, 64):
        assert choose(problem(m), names=names, cache=cache).source == "cache"
    assert choose(problem(65), names=names, cache=cache).source != "cache"


def test_hopper_reads_one_copy_of_a_weight_for_any_rows(cache):
    p = Problem(
        2048, 14336, 4096, mx.bfloat16, "affine", 4, 64, True, mx.bfloat16, "cuda", "sm_90", 16
    )
    chosen = {choose(p.replace(m=m), cache=cache).kernel for m in (1, 8, 64, 100, 2048, 8192)}
    assert chosen == {"tiled"}
    assert kernel("tiled").extra_bytes(p) == 0
    assert "dequantize+matmul" not in candidates(p)  # it reads rows, which no other plan does
    assert "dequantize+matmul" in candidates(p, budget=p.packed_bytes)
    assert choose(p, cache=cache, exact=True).kernel == "qmm"


def test_gathered_products_of_no_rows_have_an_estimate(cache):
    problem = Problem(0, 64, 64, mx.float32, "affine", 4, 64, scales_dtype=mx.float32, experts=4)
    assert choose(problem, cache=cache).kernel
