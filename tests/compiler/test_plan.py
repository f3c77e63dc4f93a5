"""Plans keep every step, say what it did, and write it all down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.inspection.serialize import from_json, to_json
from qgraph.rewrite.history import node_changes

W = mx.ones((64, 64))


def model(x: Any) -> Any:
    return qg.fori_loop(0, 8, lambda i, h: qg.tanh(qg.quantized_matmul(h, W)), x)


def plan() -> qg.Plan:
    return qg.optimize(qg.trace(model, qg.spec((1, 64))), target="cpu")


def test_steps_are_a_chain() -> None:
    found = plan()
    assert [s.name for s in found.steps] == [p.name for p in qg.default_passes(found.target)]
    graph = found.source
    for step in found.steps:
        assert step.before is graph
        graph = step.after
    assert graph is found.graph


def test_a_step_says_what_it_did() -> None:
    steps = {s.name: s for s in plan().steps if s.changed}
    assert "1 hoisted" in steps["hoist-quantize"].summary()
    unchanged = next(s for s in plan().steps if not s.changed)
    assert unchanged.summary() == "nothing"


def test_node_changes_look_into_bodies() -> None:
    found = plan()
    removed, added = node_changes(found.source, found.graph)
    assert "quantize" in {n.op for n in removed}
    assert {n.stage for n in added if n.op == "quantize"} == {"pack"}


def test_weights_are_what_the_arrays_are() -> None:
    (weight,) = plan().weights()
    assert weight.name == "W"
    assert weight.float_bytes == W.nbytes
    assert weight.packed_bytes == sum(p.nbytes for p in mx.quantize(W, group_size=64, bits=4))
    assert weight.bits == 4


def test_the_report_has_every_pass_and_weight() -> None:
    found = plan()
    text = found.report()
    for step in found.steps:
        assert step.name in text
    assert "16,384" in text  # 64 * 64 float32
    assert max(map(len, text.splitlines())) <= 100


def test_a_dump_has_every_step(tmp_path: Path) -> None:
    found = plan()
    folder = found.dump(tmp_path / "plan")
    assert (folder / "00-as-written.txt").read_text() == f"{found.source}\n"
    for number, step in enumerate(found.steps, 1):
        file = folder / f"{number:02}-{step.name}.txt"
        assert file.exists() == step.changed
        if step.changed:
            assert file.read_text() == f"{step.after}\n"
            diff = folder / f"{number:02}-{step.name}.diff.txt"
            assert diff.read_text() == f"{found.diff(number - 1)}\n"
    assert (folder / "plan.txt").read_text() == f"{found.graph}\n"
    arrays: dict[str, mx.array] = {}
    assert to_json(found.graph, arrays) + "\n" == (folder / "plan.json").read_text()
    again = from_json((folder / "plan.json").read_text(), arrays)
    assert str(again) == str(found.graph)
    assert (folder / "report.txt").read_text() == f"{found.report()}\n"
    assert len((folder / "ledger.txt").read_text().splitlines()) == len(found.ledger())


def test_a_plan_can_be_dumped_after_its_weights_were_let_go(tmp_path: Path) -> None:
    program = qg.compile(lambda x: model(x), qg.spec((1, 64)), target="cpu")
    folder = program.plan.dump(tmp_path)
    assert "hoisted" in (folder / "ledger.txt").read_text()
    assert '"$array"' in (folder / "00-as-written.json").read_text()


def test_dumps_are_the_same_every_time(tmp_path: Path) -> None:
    first, second = (plan().dump(tmp_path / name) for name in "ab")
    for file in first.iterdir():
        if file.name != "report.txt":  # that one has the times
            assert file.read_text() == (second / file.name).read_text()
