"""The command line on modules, files and wrong words."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner, Result

import qgraph as qg
from qgraph.cli import commands as cli
from qgraph.cli.sources import example_inputs, find, parse_spec

MODEL = """
import mlx.core as mx
import qgraph as qg

print("loading")
w = mx.ones((64, 64))


def step(x):
    return qg.fori_loop(0, 8, lambda i, h: qg.tanh(qg.quantized_matmul(h, w)), x)


def clean(x):
    return qg.tanh(x)


def broken(x):
    return x @ x


def made():
    return qg.trace(step, qg.spec((1, 64)))


def compiled():
    return qg.compile(step, qg.spec((1, 64)), target="cpu")


number = 3
"""
X = "f32[1,64]"


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a module of a user's, and a cache of our own."""
    (tmp_path / "users_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))
    paths, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if name == "users_model":
            del sys.modules[name]


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def ok(*words: str, status: int = 0) -> str:
    result = call(*words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


def test_show_a_function() -> None:
    text = ok("show", "users_model:step", "--spec", X, "--target", "cpu")
    assert text.startswith("graph step(x: f32[1,64]) -> f32[1,64]\n  pack (once):\n")
    assert "users_model.py:10" in text
    assert "loading" not in text  # goes to standard error
    assert "pack (once)" not in ok("show", "users_model:step", "-s", X, "--written")


@pytest.mark.parametrize(
    "where",
    ["users_model:made", "users_model.py:made", "./users_model.py:made", "users_model:compiled"],
)
def test_ways_to_name_the_same(where: str) -> None:
    text = ok("show", where, "--written")
    assert text == ok("show", "users_model:step", "--spec", X, "--written")


def test_show_a_part() -> None:
    text = ok("show", "users_model:made", "--written", "--op", "tanh")
    assert "tanh(" in text
    assert "2 not shown" in text
    assert "FLOP" in ok("show", "users_model:made", "--costs")
    assert "\x1b[" in ok("show", "users_model:made", "--colour")
    assert "passes for cpu" in ok("show", "users_model:made", "--report", "-t", "cpu")


def test_show_a_saved_graph(tmp_path: Path) -> None:
    graph = qg.trace(lambda x: qg.tanh(x) * 2, qg.spec((4,)), name="saved")
    (tmp_path / "g.json").write_text(graph.to_json())
    shown = ok("show", "g.json", "--written")
    assert shown.splitlines()[0] == "graph saved(x: f32[4]) -> f32[4]"
    assert "tanh(x)" in shown
    ok("diff", "g.json", "g.json", "--exit-code")


def test_the_json_of_a_dump_lacks_arrays(tmp_path: Path) -> None:
    ok("dump", "users_model:made", str(tmp_path / "out"))
    with pytest.raises(qg.errors.InputError, match=r"written.json: the array .* is not there"):
        find(str(tmp_path / "out" / "00-as-written.json"))


def test_show_a_timeline() -> None:
    for words in ((), ("--written",)):
        text = ok("show", "users_model:made", "-t", "cpu", "--timeline", *words)
        first, stream, *_ = text.splitlines()
        assert first.startswith("step: one call, estimated ")
        assert stream.startswith("  stream 0  [")
        assert "critical path" in text


def test_an_artefact_is_as_good_as_a_module(tmp_path: Path) -> None:
    program = find("users_model:compiled")
    assert isinstance(program, qg.Program)
    program.save(tmp_path / "saved")
    assert "quantized_matmul(h, @w_q, @w_s, @w_b)" in ok("show", "saved")
    assert "node by node" in ok("profile", "saved", "--repeats", "1")
    assert "nothing costly" in ok("lint", "saved")


def test_diff() -> None:
    text = ok("diff", "users_model:made", "--pass", "hoist-quantize", "-t", "cpu")
    assert text.startswith("hoist-quantize: 1 node moved\n")
    ok("diff", "users_model:made", "--exit-code", status=1)
    ok("diff", "users_model:clean", "-s", X, "--exit-code")
    ok("diff", "users_model:step", "users_model:clean", "-s", X, "--exit-code", status=1)
    ok("diff", "users_model:made")


def test_dump_and_ledger(tmp_path: Path) -> None:
    assert "out" in ok("dump", "users_model:made", str(tmp_path / "out"))
    assert (tmp_path / "out" / "00-as-written.txt").read_text().startswith("graph step")
    assert "hoisted" in ok("ledger", "users_model:made", "-t", "cpu")


def test_lint_has_a_status() -> None:
    assert "inside a loop, users_model.py:10: 8 times" in ok("lint", "users_model:made", status=1)
    assert ok("lint", "users_model:clean", "-s", X) == "nothing costly found\n"


def test_profile() -> None:
    text = ok("profile", "users_model:compiled", "--repeats", "1")
    assert "node by node" in text
    assert re.search(r"tanh\(%\d+\).*users_model.py:10", text)


def test_tune_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qgraph.kernels.choice.tuner.measure", lambda problem, names: {})
    monkeypatch.setattr(
        "qgraph.kernels.choice.tuner.choose",
        lambda problem, tune: f"{'tuned' if tune else 'guessed'} {problem.n}",
    )
    text = ok("tune", "users_model:made", "-t", "cpu")
    assert text == "f32[1,64] x affine4[64,64] g64 s:f32: tuned 64\n"
    assert "no quantized product" in ok("tune", "users_model:clean", "-s", X)


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def main(*args: object) -> int:
        given.extend(args)
        return 0

    monkeypatch.setattr("qgraph.cli.demo.main", main)
    ok("demo", "--model", "toy", "--tokens", "3")
    assert given[0] == "toy"
    assert given[2:4] == [Path("qgraph-demo"), 3]
    assert call("demo", "--model", "other").exit_code == 2


WRONG: list[tuple[list[str], str]] = [
    (["show", "nothing"], "there is no file 'nothing'"),
    (["show", "users_model.py"], "write users_model.py:NAME; it has step, clean"),
    (["show", "no_module:f"], "no module 'no_module'"),
    (["show", "users_model:stop"], "it has step, clean, broken, made, compiled"),
    (["show", "users_model:number"], "is of type int"),
    (["show", "users_model:step", "-s", "f33[1]"], "is no type"),
    (["show", "users_model:step", "-s", "f32[a]"], "sizes are whole numbers"),
    (["show", "users_model:step"], "users_model:step: missing a required argument"),
    (["show", "users_model:step", "-s", X, "-s", X], "give one --spec for each argument"),
    (["show", "users_model:broken", "-s", X], "matmul cannot take"),
    (["show", "users_model:made", "-t", "tpu"], "give 'cpu', 'gpu'"),
    (["show", "users_model:made", "--feeds", "%99"], "error: no value is called '%99'\n  did you"),
    (["diff", "users_model:made", "-p", "fuse"], "no pass 'fuse' ran"),
    (["generate", "--model", "/nowhere"], "there is no folder /nowhere"),
    (["serve", "--model", "."], "holds no model: config.json not found"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_errors_are_words_and_status_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(lambda: cli.app(words, standalone_mode=False))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_help_teaches() -> None:
    text = ok("--help")
    for command in ("show", "diff", "dump", "lint", "profile", "tune", "demo", "doctor"):
        assert command in text
        assert ok(command, "--help")
    assert "--spec" in text
    assert "Exit status" in text
    assert "install-completion" in text
    assert call("show").exit_code == 2


def test_specs() -> None:
    found = parse_spec("tokens: i32[1,16]")
    assert (found.type.shape, found.type.dtype, found.name) == ((1, 16), mx.int32, "tokens")
    assert parse_spec("bool[]").type.shape == ()
    with pytest.raises(qg.errors.InputError):
        parse_spec("f32[-1]")


def test_made_up_inputs_are_those_of_the_graph() -> None:
    graph = qg.trace(lambda a, b: a + b, qg.spec((2, 3), mx.float16), qg.spec((3,), mx.int32))
    arrays = example_inputs(graph)
    assert [(a.shape, a.dtype) for a in arrays] == [(v.shape, v.dtype) for v in graph.inputs]
    assert mx.array_equal(arrays[0], example_inputs(graph)[0]).item()
    assert float(mx.abs(arrays[0]).sum()) > 0


def test_find_takes_plans() -> None:
    source = find("users_model:made")
    assert isinstance(source, qg.Graph)
    module = sys.modules["users_model"]
    module.plan = qg.optimize(source, passes=[])  # type: ignore[attr-defined]
    assert find("users_model:plan") is module.plan  # type: ignore[attr-defined]
    assert "pack (once)" not in ok("show", "users_model:plan")  # its own plan, with no passes


def test_a_file_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for path in (str(tmp_path / "users_model.py"), "../users_model.py"):
        assert "users_model.py:10" in ok("lint", f"{path}:step", "--spec", X, status=1)
