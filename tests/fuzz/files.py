"""Files from strangers: graphs in JSON, weights and artefacts with anything anywhere in them.

What is read is refused in words, or is a graph that keeps its promises and runs as it says.
`damage.py` goes through single damages one by one; here several come together.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from hypothesis import strategies as st

from qgraph.errors import QGraphError
from qgraph.ir import Graph
from qgraph.runtime import safetensors
from qgraph.runtime.artefact import ABOUT, GRAPH, WEIGHTS
from tests.fuzz.artefacts import PROGRAMS, outcome, saved
from tests.fuzz.surface import Surface, in_words

Case = tuple[str, Any]

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.integers(-(2**70), 2**70), st.floats(),
    st.text(max_size=4), st.sampled_from(["f32[2,64]", "i32[]", "add", "getitem", "constant"]),
    st.builds(lambda n, i: {"$value": [n, i]}, st.integers(-1, 20), st.integers(-1, 2)),
    st.sampled_from(["f16", "f32", "i8", "u32"]).map(lambda name: {"$dtype": name}),
    st.lists(st.integers(-2, 70), max_size=3).map(lambda sizes: {"$tuple": sizes}),
    st.lists(st.one_of(st.none(), st.integers(-3, 70)), min_size=3, max_size=3).map(
        lambda ends: {"$slice": ends}),
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.one_of(VALUES, st.sampled_from(["copy", "remove"])),
              st.integers(0, 10**6)),
    min_size=1, max_size=4,
)  # fmt: skip
BYTES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)
HEADERS = st.dictionaries(
    st.sampled_from(["w", "__metadata__", "", "0.w"]),
    st.one_of(
        VALUES,
        st.fixed_dictionaries(
            {
                "dtype": st.one_of(st.sampled_from(["F32", "U8", "BF16", "F8_E4M3"]), VALUES),
                "shape": st.one_of(st.lists(st.integers(-1, 2**33), max_size=3), VALUES),
                "data_offsets": st.one_of(st.lists(st.integers(-1, 70), max_size=3), VALUES),
            }
        ),
    ),
    max_size=2,
)


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every container and key within."""
    found = []
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            found += [(data, key), *_places(data[key])]
    return found


def edited(text: bytes, edits: Any) -> bytes:
    """The JSON with some of its fields set to values, to copies of others, or gone."""
    data = json.loads(text)
    for place, value, other in edits:
        places = _places(data)
        if not places:
            break
        container, key = places[place % len(places)]
        if value == "remove":
            del container[key]
        elif value == "copy":
            source, at = places[other % len(places)]
            container[key] = json.loads(json.dumps(source[at]))
        else:
            container[key] = value
    return json.dumps(data).encode()


def _flipped(content: bytes, changes: Any) -> bytes:
    made = bytearray(content)
    for place, value in changes:
        made[place % len(made)] = value
    return bytes(made)


def _artefact(case: Any) -> None:
    name, file, edits = case
    files = saved(name)
    outcome(name, {**files, file: edited(files[file], edits)}, sign=file == GRAPH)


def _weights(case: Any) -> None:
    name, changes = case
    files = saved(name)
    outcome(name, {**files, WEIGHTS: _flipped(files[WEIGHTS], changes)}, sign=True)


def _read(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        path.write_bytes(content)
        for array in safetensors.read(path).values():
            mx.eval(array)


def _header(case: Any) -> None:
    header, data, length = case
    text = json.dumps(header).encode()
    _read((len(text) + length).to_bytes(8, "little", signed=True) + text + data)


def _text(content: bytes) -> None:
    graph = Graph.from_json(content.decode(errors="replace"))
    str(graph)
    assert str(Graph.from_json(graph.to_json())) == str(graph)


def _graph(case: Any) -> None:
    name, changes = case
    _text(_flipped(saved(name)[GRAPH], changes))


NAMES = st.sampled_from(list(PROGRAMS))
KINDS = {
    "artefact": (st.tuples(NAMES, st.sampled_from([GRAPH, GRAPH, ABOUT]), EDITS), _artefact),
    "weights": (st.tuples(NAMES, BYTES), _weights),
    "header": (st.tuples(HEADERS, st.binary(max_size=70), st.sampled_from([0, 0, 0, 1, -1])),
               _header),
    "bytes": (st.binary(max_size=60), _read),
    "text": (st.binary(max_size=40), _text),
    "graph": (st.tuples(NAMES, BYTES), _graph),
}  # fmt: skip


def check(case: Case) -> None:
    kind, given = case
    try:
        KINDS[kind][1](given)
    except QGraphError as error:
        in_words(error)


FILES = Surface(
    st.one_of(*(st.tuples(st.just(kind), cases) for kind, (cases, _) in KINDS.items())),
    check,
    daily=150,
)
