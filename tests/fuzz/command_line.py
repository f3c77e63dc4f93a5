"""The command line: any words in any order.  It answers or refuses, never with a traceback."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import typer
from hypothesis import strategies as st
from typer.testing import CliRunner

import qgraph as qg
from qgraph.cli import commands
from qgraph.errors import QGraphError
from tests.fuzz.artefacts import X, saved, small
from tests.fuzz.surface import Surface, in_words

MODEL = """
import mlx.core as mx
import mlx.nn as nn
import qgraph as qg

w = mx.ones((64, 64))
layer = nn.Linear(64, 64)
number = 3
empty = []


def step(x):
    return qg.tanh(qg.quantized_matmul(x, w))


def made():
    return qg.trace(step, qg.spec((1, 64)))


def two(x, y=1):
    return x @ y


class Model:
    def __call__(self, x):
        return x + w
"""
COMMANDS = ["show", "diff", "dump", "ledger", "lint", "profile", "demo", "doctor", "--help"]
WHERE = st.sampled_from(
    [
        *(f"fuzzed_model:{n}" for n in ("step", "made", "two", "layer", "number", "empty", "Model",
                                        "w", "nothing", "mx.add", "qg", "", ":", "step.x")),
        *("fuzzed_model.py:made", "fuzzed_model.py", "graph.json", "plan.json", "artefact"),
        *("damaged.json", "broken.py:x", "nowhere", "", ".", "..", "/", "a:b", ":", "no.json"),
        "qgraph.examples.first_program:graph",
    ]
)  # fmt: skip
OPTIONS = st.one_of(
    st.sampled_from(
        ["--written", "--report", "--costs", "--fold", "--timeline", "--colour", "--no-colour",
         "--exit-code", "--help", "--nothing", "-"]
    ).map(lambda word: [word]),
    st.tuples(
        st.sampled_from(["--spec", "-s", "--target", "-t", "--op", "--name", "--line", "--feeds",
                         "--reads", "--depth", "--limit", "--html", "--pass", "--repeats", "--top",
                         "--model"]),
        st.one_of(
            st.sampled_from(["f32[1,64]", "f32[64]", "i32[]", "cpu", "gpu", "*", "%0", "%99", "x",
                             "12", "0", "-1", "1", "fuse-quantized-matmul", "page.html", "/", "[",
                             "no/page.html", "toy", "99999999999999999999"]),
            st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=6),
        ),
    ).map(list),
)  # fmt: skip
CASES = st.tuples(
    st.sampled_from(COMMANDS),
    st.lists(WHERE, max_size=2),
    st.lists(OPTIONS, max_size=3),
).map(lambda case: [case[0], *case[1], *(word for option in case[2] for word in option)])


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """A folder with a module, graphs and artefacts of a user's."""
    made = tempfile.TemporaryDirectory()
    path = Path(made.name)
    (path / "fuzzed_model.py").write_text(MODEL)
    (path / "broken.py").write_text("x = 1 +")
    graph = qg.trace(small, X)
    (path / "graph.json").write_text(graph.to_json())
    (path / "damaged.json").write_text(graph.to_json()[:-100])
    (path / "artefact").mkdir()
    for name, content in saved("small").items():
        (path / "artefact" / name).write_bytes(content)
    return made


@contextmanager
def inside() -> Iterator[None]:
    """In that folder, with a cache of its own."""
    before, paths = Path.cwd(), list(sys.path)
    os.chdir(folder().name)
    caches = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(Path(folder().name) / "cache")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(before)
        sys.path[:] = paths
        if caches is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = caches


def check(words: list[str]) -> None:
    if words == ["doctor"]:
        return  # it builds for a minute; `tests/cli/test_doctor.py` asks it
    if words[0] == "demo" and not {"--help", "--model"} & set(words):
        return  # it would fetch a model
    if "smollm2" in words or ("demo" in words and "toy" in words):
        return  # nor answers with one
    with inside():
        result = CliRunner().invoke(commands.app, words)
    error = result.exception
    if isinstance(error, QGraphError | ValueError):  # what `main` prints in words
        return in_words(error)
    if error is not None and not isinstance(error, SystemExit | typer.Exit):
        raise error
    assert result.exit_code in (0, 1, 2), result.output


COMMAND_LINE = Surface(CASES, check, daily=60)
