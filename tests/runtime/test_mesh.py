"""Several processes over MLX's ring on this machine: they agree, and notice who is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

import qgraph as qg
from qgraph.examples import smollm2_files as files
from qgraph.runtime.mesh import LOST, difference
from tests.support.ports import hosts
from tests.support.rank import PROMPT, generator, relay, tiny

ROOT = Path(__file__).parents[2]
PATIENCE = 400
"""Seconds, on a busy machine; a scenario takes five on an idle one."""


def launch(scenario: str, ranks: int, folder: Path) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each rank.  `mlx.launch` would end all with the first."""
    env = {**os.environ, "MLX_HOSTFILE": str(hosts(ranks, folder)), "PYTHONPATH": str(ROOT)}
    if ranks > 2 or scenario in ("raises", "differ"):  # compilers of C++ would take the time
        env["MLX_DISABLE_COMPILE"] = "1"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.rank", scenario],
            env={**env, "MLX_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        texts = [p.communicate(timeout=PATIENCE) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *t) for p, t in zip(processes, texts, strict=True)]


def test_a_thousand_steps(tmp_path: Path) -> None:
    """MLX issue 4475: of all_sums over a ring 3 in 100 are said not to return."""
    for status, out, errors in launch("steps", 2, tmp_path):
        assert status == 0, errors
        assert "1000 steps returned" in out


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens(ranks: int, tmp_path: Path) -> None:
    """Each rank gives the tokens that one process gives; then twenty small steps return."""
    expected = " ".join(map(str, ["tokens", *generator(None).tokens(PROMPT, 8)]))
    for status, out, errors in launch("tokens", ranks, tmp_path):
        assert status == 0, errors
        assert expected in out


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_of_smollm2(ranks: int, tmp_path: Path) -> None:
    """Of the real model, which has nine heads, three of keys and values."""
    try:
        found = files.load()
    except files.ModelFilesMissing as missing:
        pytest.skip(str(missing))
    expected = " ".join(map(str, ["tokens", *generator(None, found).tokens(PROMPT, 12)]))
    for status, out, errors in launch("smollm2", ranks, tmp_path):
        assert status == 0, errors
        assert expected in out


def test_a_model_of_mlx_lm(tmp_path: Path) -> None:
    """Its logits are the model's own; caches hold a rank's heads."""
    for status, _, errors in launch("model", 2, tmp_path):
        assert status == 0, errors


@pytest.mark.parametrize(
    ("scenario", "why"), [("killed", "its process ended"), ("raises", "it raised KeyError")]
)
def test_a_lost_rank_ends_the_others(scenario: str, why: str, tmp_path: Path) -> None:
    ranks = 3 if scenario == "killed" else 2
    _, lost, *_ = results = launch(scenario, ranks, tmp_path)
    assert lost[0] not in (0, LOST)
    for status, _, errors in results[:1] + results[2:]:
        assert status == LOST
        assert f"rank 1 of {ranks} was lost: {why}" in errors


def test_a_rank_stays_for_the_others(tmp_path: Path) -> None:
    """Where they may be reading its memory."""
    done, ends = [], []
    for status, out, errors in launch("stays", 3, tmp_path):
        assert status == 0, errors
        assert "reads nothing more" in out
        words = dict(line.split() for line in out.splitlines() if line.startswith(("done", "ends")))
        done.append(float(words["done"]))
        ends.append(float(words["ends"]))
    assert min(ends) > max(done)


def test_plans_that_differ(tmp_path: Path) -> None:
    for status, _, errors in launch("differ", 2, tmp_path):
        assert status == 1
        assert "MeshError: the ranks' plans differ: collective 0 is" in errors


def test_differences_of_plans() -> None:
    assert difference({0: ["f", "a"], 1: ["f", "a"]}) == ""
    assert "rank 2 made g" in difference({0: ["f"], 1: ["f"], 2: ["g"]})
    assert "rank 1 has 2" in difference({0: ["f", "a"], 1: ["f", "a", "b"]})


def test_a_model_on_a_mesh_in_one_process() -> None:
    model = tiny()
    fast = qg.lm.accelerate(model, target="cpu", mesh=qg.Mesh(2), background=False)
    steps = [list(map(int, (t for t, _ in generate_step(mx.array(PROMPT), m, max_tokens=6))))
             for m in (model, fast)]  # fmt: skip
    assert steps[0] == steps[1]
    assert not fast.qgraph.eager


def test_messages_in_one_process() -> None:
    """What a rank sends comes to the one that it is for, and nowhere else."""
    x = mx.array([1.0, 2.0])
    first, second, on_all = qg.compile(relay, x, mesh=qg.Mesh(3))(x)
    assert [first.tolist(), second.tolist(), on_all.tolist()] == [[2, 4], [1, 1], [3, 5]]


def test_messages_between_processes(tmp_path: Path) -> None:
    for status, out, errors in launch("messages", 3, tmp_path):
        assert status == 0, errors
        assert "on all [3.0, 5.0]" in out


def test_messages_of_one_end() -> None:
    """The other end is in another rank's graph, which one process has not."""
    for one in (lambda x: qg.distributed.send(x, 1), lambda x: x + _received()):
        with pytest.raises(qg.errors.UnsupportedError, match="without its other end"):
            qg.compile(one, qg.spec((2,)), mesh=qg.Mesh(2))


def _received() -> Any:
    return qg.distributed.recv((2,), mx.float32, 0)


def test_messages_that_are_alike_are_two() -> None:
    """They are no common subexpression, and what comes is no constant."""
    plan = qg.optimize(qg.trace(lambda x: x + _received() * _received(), qg.spec((2,))))
    assert [n.op for n in plan.graph.nodes].count("distributed.recv") == 2


def test_meshes_say_what_is_wrong() -> None:
    with pytest.raises(qg.errors.InputError, match="a mesh of 0"):
        qg.Mesh(0)
    with pytest.raises(qg.errors.InputError, match="a mesh for 'fun'"):
        qg.Mesh(2, goal="fun")  # type: ignore[arg-type]
    with pytest.raises(qg.errors.InputError, match="no back end 'udp'"):
        qg.Mesh(2, backend="udp")
    assert qg.Mesh.of(mx.distributed.init()).rank == 0
