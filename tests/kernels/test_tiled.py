"""What does not need a GPU of a weight in tiles: packed once, laid back for MLX, saved, cut up."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.kernels import Problem, kernel
from qgraph.kernels.choice.cost import CostTable, table_for
from qgraph.kernels.choice.measuring import random_operands
from qgraph.kernels.choice.tuner import Choice, estimate
from qgraph.kernels.matmul.tiled.blocks import BLOCKS, block
from qgraph.kernels.streams import Streams
from qgraph.passes import ChooseKernel, HoistQuantize, choose_kernel
from qgraph.target import Target

CPU = mx.Device(mx.cpu, 0)
MODES = [("affine", 4, 64), ("affine", 3, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
PASSES = [ChooseKernel(Target(CPU, "cpu", "x86_64", 2), min_flops=0), HoistQuantize()]
Q = mx.quantize(mx.random.normal((100, 192)).astype(mx.float16))
X = mx.random.normal((5, 192)).astype(mx.float16)


def problem(m: int = 3, n: int = 100, k: int = 192, **changes: Any) -> Problem:
    return Problem(m, n, k, mx.bfloat16, "affine", 4, 64, backend="cuda", arch="sm_90").replace(
        **changes
    )


@pytest.mark.parametrize("mode", MODES, ids=lambda m: f"{m[0]}{m[1]}")
def test_mlx_multiplies_the_same_arrays(mode: tuple[str, int, int]) -> None:
    name, bits, group = mode
    scales = mx.bfloat16 if name == "affine" else mx.uint8
    p = problem(mode=name, bits=bits, group_size=group, scales_dtype=scales)
    x, parts = random_operands(p)
    packed = kernel("tiled").pack(parts, p)
    y = kernel(kernel("tiled").mlx_form).run(x, packed, p, Streams(CPU))
    assert mx.array_equal(y, mx.quantized_matmul(x, *parts, **p.settings)).item()


def test_mlx_gathers_from_the_same_arrays() -> None:
    p = problem(experts=3)
    x, parts = random_operands(p)
    packed = kernel("group+tiled").pack(parts, p)
    chosen: Any = kernel(kernel("group+tiled").mlx_form)
    rhs = mx.array([2, 0, 2], mx.uint32)
    y = chosen.run(x[:, None], packed, p, Streams(CPU), None, rhs)
    plain = mx.gather_qmm(x[:, None], *parts, rhs_indices=rhs, **p.settings)
    assert mx.array_equal(y, plain).item()


def test_a_plan_packs_it_once_and_saves_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = Choice("untiled+qmm", "table", 1.0, (("qmm", 1000.0),))
    monkeypatch.setattr(choose_kernel, "choose", lambda *_, **__: chosen)
    model = qg.jit(lambda x: qg.quantized_matmul(x, *Q), target="cpu", passes=PASSES)
    want = mx.quantized_matmul(X, *Q)
    for rows in (1, 5):
        assert mx.array_equal(model(X[:rows]), mx.quantized_matmul(X[:rows], *Q)).item()
    tiles = kernel("untiled+qmm").pack(Q, problem(dtype=mx.float16, scales_dtype=mx.float16))
    assert model.weight_bytes == sum(part.nbytes for part in tiles)
    program = qg.compile(lambda x: qg.quantized_matmul(x, *Q), X, target="cpu", passes=PASSES)
    program.save(tmp_path / "saved")
    assert mx.array_equal(qg.load(tmp_path / "saved")(X), want).item()
    again = mx.import_function(str(program.export(tmp_path / "f.mlxfn")))
    assert mx.array_equal(again(X)[0], want).item()


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
def test_every_product_is_cut_into_what_a_block_can_hold(arch: str) -> None:
    limit = {"sm_80": 163, "sm_90": 227}.get(arch, 99) << 10
    rng = np.random.default_rng(0)
    for _ in range(200):
        bits, group = int(rng.choice([2, 3, 4, 5, 6, 8])), int(rng.choice([32, 64, 128]))
        m, n, k = (int(2 ** rng.uniform(0, 13)) for _ in range(3))
        p = problem(m, n, 128 * -(-k // 128), bits=bits, group_size=group, arch=arch)
        b = block(p)
        assert b.shared_memory(p) <= limit
        assert b.stages >= 3
        assert b.depth // 64 // b.split in (1, 2)
        assert b.threads <= 512
        assert b.count(p) * b.columns * 64 * b.rows >= m * n
    assert sorted({b.columns for b in BLOCKS}) == [8, 16, 32, 64, 96, 128, 192, 256]


def test_few_rows_of_a_small_weight_need_no_second_launch() -> None:
    assert block(problem(1, 4096, 4096)).parts == 1
    assert block(problem(8, 14336, 4096)).parts == 1
    assert block(problem(64, 4096, 14336)).parts > 1


def test_the_model_is_near_what_the_table_holds() -> None:
    """Of products from 2048×2048 to 151936×896 four in five within 1.25, on either side."""
    table = table_for(problem())
    sizes = ((2048, 2048), (4096, 4096), (14336, 4096), (4096, 14336), (151936, 896))
    rows = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 2048)
    apart = []
    for (n, k), m in itertools.product(sizes, rows):
        p = problem(m, n, k)
        measured, modelled = table.measured("tiled", p), kernel("tiled").modelled(p)
        assert measured is not None
        assert modelled == estimate("tiled", p, CostTable(table.machine, {}, table.curves))
        apart.append(modelled / measured)
    assert np.mean([0.8 <= ratio <= 1.25 for ratio in apart]) > 0.8
    assert 0.9 < np.median(apart) < 1.1


def test_padding_is_counted() -> None:
    p = problem(4, 65, 128)
    _, parts = random_operands(p)
    more = sum(a.nbytes for a in kernel("tiled").pack(parts, p)) - sum(a.nbytes for a in parts)
    assert kernel("tiled").extra_bytes(p) == more > 0
