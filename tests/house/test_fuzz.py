"""A seed a day for every fuzzer, some damages of every artefact, and what they have found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.analysis.verify import verify
from qgraph.cli.sources import find
from qgraph.errors import InputError, QGraphError, VerifyError
from qgraph.rewrite import ApplyRules, Rule
from tests.fuzz import damage
from tests.fuzz.surface import today
from tests.fuzz.surfaces import SURFACES

X = mx.ones((2, 3))


@pytest.mark.parametrize("name", SURFACES)
def test_a_seed_a_day(name: str) -> None:
    """`python -m tests.fuzz NAME --count N` for more of the same."""
    surface = SURFACES[name]
    assert surface.run(surface.daily, today(), seconds=5) > 0


@pytest.mark.parametrize("name", damage.PROGRAMS)
def test_some_damages(name: str) -> None:
    """`python -m tests.fuzz.damage` goes through all of them."""
    counts, findings = damage.run(name, every=200 if name != "small" else 50, seconds=5)
    assert not findings, findings
    assert counts["refused"] > 10
    assert counts["own"] + counts["same"] + counts["loaded"] > 0


@pytest.mark.parametrize("name", ["reverse", "xs", "length"])
def test_a_scan_without_one_of_its_settings_is_refused(name: str) -> None:
    graph = qg.trace(lambda x: qg.scan(lambda c, s: (c + s, c), x[0], x), X)
    data = json.loads(graph.to_json())
    scan = next(node for node in data["graph"]["nodes"] if node["op"] == "scan")
    scan["args"][name + "d"] = scan["args"].pop(name)
    with pytest.raises(VerifyError, match="instead of"):
        verify(qg.Graph.from_json(json.dumps(data)))


def test_a_number_where_a_value_stands_is_refused() -> None:
    """A region would read the operand beside it in its place."""
    data = json.loads(qg.trace(lambda x: x > 0, X).to_json())
    data["graph"]["nodes"][-1]["args"]["a"] = 2
    with pytest.raises(VerifyError, match="has a number for a"):
        verify(qg.Graph.from_json(json.dumps(data)))


def test_the_variables_of_a_replacement_are_those_of_the_pattern() -> None:
    with pytest.raises(InputError, match="it is given the variables of the pattern by name: x"):
        Rule("r", lambda x: qg.abs(x), lambda x, y: x)
    with pytest.raises(InputError, match="unexpected keyword argument 'x'"):
        Rule("r", lambda x: qg.abs(x), lambda: X)


@pytest.mark.parametrize("made", [None, 3, "x", []])
def test_a_replacement_gives_a_tensor(made: Any) -> None:
    rule = Rule("r", lambda x: qg.abs(x), lambda x: made)
    with pytest.raises(QGraphError, match="not a tensor"):
        qg.optimize(qg.trace(qg.abs, X), passes=[ApplyRules((rule,))])


@pytest.mark.parametrize("positions", [None, 3, "0", [-1], [0.0], {0: 1}])
def test_positions_are_a_list(positions: Any) -> None:
    with pytest.raises(InputError, match="donate="):
        qg.compile(lambda x: x * 2, X, donate=positions)
    with pytest.raises(InputError, match="parameters="):
        qg.jit(lambda x: x * 2, parameters=positions)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_graph_without_a_form_gives_all_of_its_results(count: int) -> None:
    graph = qg.trace(lambda x: [x + 1, x * 2], X)
    by_hand = graph.replace(outputs=graph.outputs[:count], out_tree=None)
    found = qg.compile(by_hand, target="cpu")(X)
    wanted = [X + 1, X * 2][:count]
    for a, b in zip([found] if count == 1 else found, wanted, strict=True):
        assert mx.array_equal(a, b)


def test_what_cannot_be_read_or_called_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unread.py").write_text("import mlx.core as mx\nx = 1 +\n")
    (tmp_path / "builtins_of_mlx.py").write_text("import mlx.core as mx\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(InputError, match=r"invalid syntax in .*unread.py, line 2"):
        find("unread.py:x")
    with pytest.raises(InputError, match="does not say what it takes"):
        find("builtins_of_mlx:mx.add")
