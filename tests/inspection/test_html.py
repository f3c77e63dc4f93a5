"""The page for browsers: what is in it, and what a headless Chromium shows of it."""

from __future__ import annotations

import base64
import dataclasses
import doctest
import gzip
import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from typer.testing import CliRunner

import qgraph as qg
from qgraph.analysis.schedule import Durations, schedule
from qgraph.cli.commands import app
from qgraph.compiler.plan import Plan
from qgraph.examples import smollm2, smollm2_files
from qgraph.inspection.diff import Diff
from qgraph.inspection.names import Names
from qgraph.inspection.viewer import to_html
from qgraph.inspection.viewer.groups import Groups
from qgraph.inspection.viewer.page import plan_page
from qgraph.ir import Graph
from tests.support.browser import Page, chromium
from tests.support.passes import passes_without

ROOT = Path(__file__).parents[2]
LAYERS = 30


def data(page: str) -> dict[str, Any]:
    """What the page holds, read as the page reads it."""
    found = re.search(r'<script type="text/plain" id="data">([^<]*)</script>', page)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A decode loop over a model of 30 layers."""
    config = dataclasses.replace(smollm2_files.TOY_CONFIG, layers=LAYERS)
    model = smollm2.Llama(config, smollm2_files.toy_weights(config), length=32)
    state = (mx.array(1), mx.array(0), mx.random.key(0), model.empty_cache())
    graph = qg.trace(model.decode(4), *state, name="decode")
    return qg.optimize(graph, target="cpu", passes=passes_without("stored-scales", "form-regions"))


@pytest.fixture(scope="module")
def saved(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plan.save(tmp_path_factory.mktemp("page") / "plan.html")


def small() -> Graph:
    w = mx.ones((64, 64))

    def step(x: qg.Tensor) -> qg.Tensor:
        h = qg.fori_loop(0, 4, lambda i, h: qg.tanh(qg.quantized_matmul(h, w)), x)
        return qg.exp(h) + 1

    return qg.trace(step, qg.spec((1, 64)), name="step")


# What is in the page


def test_it_needs_no_network_and_is_the_same_every_time(plan: Plan) -> None:
    page = to_html(plan)
    assert page == to_html(plan)
    outside = re.findall(r'(?:src|href)="?(?!data:)[^\s>"]+|@import|url\((?!#)', page)
    assert outside == []
    addresses = set(re.findall(r"https?://[\w./-]+", page))
    assert all(address.startswith("http://www.w3.org/") for address in addresses)  # namespaces


def test_every_pass_that_changed_something_has_its_graph(plan: Plan, saved: Path) -> None:
    steps = data(saved.read_text())["steps"]
    assert [s["name"] for s in steps] == ["as written", *(s.name for s in plan.steps)]
    changed = [step for step in plan.steps if step.changed]
    shown = [s for s in steps[1:] if "graph" in s]
    assert [s["name"] for s in shown] == [s.name for s in changed]
    for step, record in zip(changed, shown, strict=True):
        ops = [n for n in record["graph"]["nodes"] if n["op"] not in ("constant", "input")]
        assert len(ops) == step.after.count()


def test_tracks_follow_nodes_through_the_passes(plan: Plan) -> None:
    record = plan_page(plan)
    stages = [s for s in record["steps"] if "graph" in s]
    first, last = ({n["t"]: n for n in s["graph"]["nodes"]} for s in (stages[0], stages[-1]))
    same = Diff(plan.source, plan.graph).same
    assert len(first.keys() & last.keys()) > 0.8 * len(same)
    for track in first.keys() & last.keys():
        assert first[track]["op"] == last[track]["op"]
    # Each product that was fused leads to the one that replaced it.
    fused = next(s for s in stages if s["name"] == "fuse-quantized-matmul")
    before = {n["t"]: n["op"] for n in stages[stages.index(fused) - 1]["graph"]["nodes"]}
    after = {n["t"]: n["op"] for n in fused["graph"]["nodes"]}
    pairs = {(before.get(old), after.get(now)) for old, now in fused["replaced"]}
    assert ("matmul", "quantized_matmul") in pairs


def test_layers_are_groups_before_and_after(plan: Plan) -> None:
    wanted = [f"model.layers.{i}" for i in range(LAYERS)]
    for graph in (plan.source, plan.graph):
        groups = Groups(graph, Names(graph))
        inside = [g.label for g in groups.all if g.kind == "block" and g.parent is not None
                  and g.parent.kind == "loop"]  # fmt: skip
        assert inside == wanted
        layers = {groups.path(n)[-1] for _, n in graph.walk() if n.op == "fast.rms_norm"}
        assert set(wanted) <= layers


def test_groups_hold_every_node_once_and_few_side_by_side() -> None:
    def chain(x: qg.Tensor) -> qg.Tensor:
        for i in range(1000):
            x = (qg.tanh, qg.exp, qg.sin)[i * i * 7919 % 83 % 3](x)
        return x

    graph = qg.trace(chain, qg.spec((4,)))
    groups = Groups(graph, Names(graph))
    assert all(node in groups.of for node in graph.nodes)
    held: dict[Any, int] = {}
    for node in graph.nodes:
        held[groups.of[node]] = held.get(groups.of[node], 0) + 1
    for group in groups.all:
        held[group.parent] = held.get(group.parent, 0) + 1
    assert max(held.values()) <= 300


def test_bars_wait_for_what_they_read_and_for_their_stream(plan: Plan) -> None:
    (loop,) = (n for n in plan.graph.nodes if n.bodies)
    bars = schedule(loop.bodies[0], Durations(plan.target))
    ends = {bar.node: bar.start + bar.seconds for bar in bars}
    free: dict[str, float] = {}
    for bar in bars:
        assert all(bar.start >= ends[v.node] for v in bar.node.inputs if v.node in ends)
        assert bar.start >= free.get(bar.stream, 0.0)
        free[bar.stream] = bar.start + bar.seconds
    whole = schedule(plan.graph, Durations(plan.target))
    assert whole[0].seconds == pytest.approx(4 * max(ends.values()))


def test_ten_thousand_nodes_are_less_than_ten_megabytes(tmp_path: Path) -> None:
    def deep(x: qg.Tensor) -> qg.Tensor:
        for _ in range(2500):
            x = qg.exp(qg.tanh(x * 1.5)) + x
        return x

    graph = qg.trace(deep, qg.spec((16, 16)), name="deep")
    assert graph.count() == 10_000
    for place in (
        graph.save(tmp_path / "graph.html"),
        qg.optimize(graph, target="cpu").save(tmp_path / "plan.html"),
    ):
        assert place.stat().st_size < 10e6
        nodes = data(place.read_text())["steps"][0]["graph"]["nodes"]
        assert sum(n["op"] not in ("constant", "input") for n in nodes) == 10_000


def test_a_profile_of_another_graph_is_refused(plan: Plan, tmp_path: Path) -> None:
    program = qg.compile(small(), target="cpu")
    profile = program.profile(mx.ones((1, 64)), repeats=1)
    with pytest.raises(qg.QGraphError, match="another graph"):
        plan.save(tmp_path / "plan.html", profile)
    with pytest.raises(ValueError, match=r"saved as \.html"):
        plan.save(tmp_path / "plan.txt")


def test_the_command_line_writes_pages(tmp_path: Path) -> None:
    runner = CliRunner()
    where = "qgraph.examples.first_program:graph"
    shown, measured = tmp_path / "plan.html", tmp_path / "profile.html"
    done = runner.invoke(app, ["show", where, "--html", str(shown)])
    assert done.exit_code == 0, done.output
    assert len(data(shown.read_text())["steps"]) > 1
    done = runner.invoke(app, ["profile", where, "--repeats", "1", "--html", str(measured)])
    assert done.exit_code == 0, done.output
    rows = data(measured.read_text())["profile"]["rows"]
    assert all(seconds > 0 for _, seconds, *_ in rows)
    done = runner.invoke(app, ["show", where, "--written", "--html", str(shown)])
    assert len(data(shown.read_text())["steps"]) == 1
    runner.invoke(app, ["dump", where, str(tmp_path / "dump")])
    assert data((tmp_path / "dump" / "plan.html").read_text())["steps"][0]["name"] == "as written"


@pytest.mark.skipif(
    not (ROOT / "web" / "node_modules").is_dir() or shutil.which("node") is None,
    reason="the page's sources are not installed: npm ci in web/",
)
def test_the_built_page_is_that_of_its_sources(tmp_path: Path) -> None:
    built = tmp_path / "viewer.html"
    command = ["node", "build.mjs", str(built)]
    subprocess.run(command, cwd=ROOT / "web", check=True, capture_output=True)
    assert (
        built.read_text() == (ROOT / "qgraph" / "inspection" / "viewer" / "viewer.html").read_text()
    )


@pytest.mark.parametrize("name", ["__init__", "groups", "page", "tracks"])
def test_doctests(name: str) -> None:
    module = importlib.import_module(f"qgraph.inspection.viewer.{name}".removesuffix(".__init__"))
    assert doctest.testmod(module).failed == 0


# What a browser shows


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(driver: Any, saved: Path) -> Iterator[Page]:
    page = Page(driver, saved)
    yield page
    assert page.errors() == []


def test_it_opens_with_layers_folded_and_both_graphs(page: Page, plan: Plan) -> None:
    for side in ("before", "after"):
        titles = page.texts(f".pane.{side} .item.block > .title")
        assert [t for t in titles if t.startswith("model.layers.")] == [
            f"model.layers.{i}" for i in range(LAYERS)
        ]
    assert page.texts(".pane.before .pane-title span") == [f"{plan.source.count()} ops"]
    assert page.texts(".pane.after .pane-title span") == [f"{plan.graph.count()} ops"]
    assert not page.count(".item.open.block")
    page.screenshot("opens")


def test_a_layer_unfolds_and_folds_in_both_graphs(page: Page) -> None:
    layer = '.pane.after .item.block[aria-label^="model.layers.3,"]'
    page.click(f"{layer} .chevron")
    assert page.count(".item.block.open") == 2
    assert "fast.rms_norm" in page.texts(".pane.after .item.block.open .item .title")
    assert "dequantize" in page.texts(".pane.before .item.block.open .item .title")
    assert "dequantize" not in page.texts(".pane.after .item.block.open .item .title")
    page.screenshot("unfolded")
    page.click(f"{layer} .chevron")
    assert not page.count(".item.block.open")


def test_search_shows_the_node_and_what_is_known_of_it(page: Page, plan: Plan) -> None:
    page.search("quantized_matmul layers.7.mlp.up_proj")
    page.wait(".details .call")
    (body,) = (n.bodies[0] for n in plan.graph.nodes if n.bodies)
    names = Names(plan.graph)
    node = next(
        n for n in body.nodes if n.op == "quantized_matmul"
        and "layers.7.mlp.up_proj" in names[n.operand("w")]
    )  # fmt: skip
    assert page.texts(".details h2") == ["quantized_matmul"]
    details = page.texts(".details")[0]
    assert names[node.output] in details
    assert str(node.output.type) in details
    assert str(node.origin) in details
    assert node.origin.source() in details
    assert "group_size = 32" in details
    assert "fuse-quantized-matmul" in page.texts(".history .pass")
    # In the graph after it is selected itself, before it is the product it stands for.
    assert page.texts(".pane.after .item.selected > .title") == ["quantized_matmul"]
    assert page.texts(".pane.before .item.selected > .title") == ["matmul"]
    page.screenshot("search")


def test_a_click_selects_on_both_sides_and_says_what_became_of_it(page: Page) -> None:
    page.click('.pane.before .item.block[aria-label^="model.layers.0,"] .chevron')
    page.click('.pane.before .item.block.open .item[aria-label^="matmul"]')
    assert page.texts(".details h2") == ["matmul"]
    assert page.texts(".details .state") == ["a later pass took it away"]
    after = page.texts(".pane.after .item.selected > .title")
    assert after
    assert set(after) <= {"quantized_matmul", "concatenate"}
    assert any("written" in entry for entry in page.texts(".history li"))
    page.screenshot("click")


def test_what_stands_for_nothing_alone_leads_to_what_went_with_it(page: Page) -> None:
    page.search("take model.embed_tokens.scales")
    assert page.texts(".details h2") == ["take"]
    before = page.texts(".pane.before .item.selected > .title")
    assert before == ["take"]
    assert any("sink-dequantize" in entry for entry in page.texts(".history li"))


def test_one_pass_alone(page: Page) -> None:
    index = page.texts(".chip").index("fuse-quantized-matmul")
    page.js("document.querySelectorAll('.chip')[arguments[0]].click()", index)
    assert "sink-dequantize" in page.texts(".pane.before .pane-title")[0]
    assert "fuse-quantized-matmul" in page.texts(".pane.after .pane-title")[0]
    page.press("e")
    new = page.texts(".pane.after .item.new > .title")
    gone = page.texts(".pane.before .item.gone > .title")
    assert new.count("quantized_matmul") == gone.count("matmul") == 7 * LAYERS + 1
    page.screenshot("one-pass")


def test_keys(page: Page) -> None:
    page.press("b")
    assert page.js("return document.body.classList.contains('one')")
    page.press("b")
    page.press("ArrowDown")
    first = page.texts(".details h2")
    page.press("ArrowDown")
    assert page.texts(".details h2") != first
    page.press("Escape")
    assert page.texts(".details h2") == ["decode"]
    page.press("c")
    top = page.js(
        "return document.querySelector('.pane.after .item.group').getBoundingClientRect().top"
    )
    assert 0 < top < 1000
    assert set(page.texts(".pane.after .item.group > .title")) == {"pack (once)", "scan[4]"}
    page.press("]")
    assert page.texts(".chip.here") == ["fold-constants"]
    page.press("?")
    assert page.js("return document.querySelector('dialog').open")
    page.screenshot("keys")


def test_the_timeline_in_the_dark(page: Page, plan: Plan) -> None:
    page.press("t")
    page.press("l")
    (body,) = (n.bodies[0] for n in plan.graph.nodes if n.bodies)
    bars = schedule(body, Durations(plan.target))
    assert page.count(".timeline .bar") == len(bars)
    streams = {bar.stream for bar in bars}
    assert page.texts(".lane-name") == [f"stream {name}" for name in sorted(streams)]
    page.click(".timeline .bar.s0")
    assert page.texts(".details h2") == [bars[0].node.op]
    assert page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    page.screenshot("timeline-dark")


def test_a_profile_colours_nodes_by_their_time(driver: Any, tmp_path: Path) -> None:
    program = qg.compile(small(), target="cpu")
    profile = program.profile(mx.ones((1, 64)), repeats=1)
    page = Page(driver, program.plan.save(tmp_path / "plan.html", profile))
    shares = {row.node.op: profile.share(row) for row in profile.rows}
    assert "%" in page.texts(".pane.after .item.hot > .mark-text")[0]
    heats = page.js(
        "return Object.fromEntries([...document.querySelectorAll('.pane.after .item.hot.node')]"
        ".map(e => [e.querySelector('.title').textContent, "
        "parseFloat(e.style.getPropertyValue('--heat'))]))"
    )
    assert heats == pytest.approx({op: 100 * shares[op] ** 0.5 for op in heats}, abs=0.1)
    assert set(heats) == set(shares)
    page.search("tanh")
    assert "measured" in page.texts(".details dt")
    page.screenshot("profile")
    assert page.errors() == []


def test_a_graph_alone(driver: Any, tmp_path: Path) -> None:
    graph = small()
    page = Page(driver, graph.save(tmp_path / "graph.html"))
    result = f"return {Names(graph)[graph.outputs[0]]}"
    titles = page.texts(".pane.after .item > .title")
    assert {"fori_loop[4]", "quantized_matmul", "tanh", "exp", "add", result} <= set(titles)
    assert not page.count(".passes-strip")
    page.click('.pane.after .item[aria-label^="tanh"]')
    assert page.texts(".details h2") == ["tanh"]
    page.screenshot("graph")
    assert page.errors() == []
