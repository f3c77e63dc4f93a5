"""A saved program is data from strangers: what its files say is checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.analysis.kernel_settings import _CHECKS
from qgraph.analysis.verify import verify
from qgraph.errors import QGraphError, ShapeError
from qgraph.inspection.serialize import from_json, to_json
from qgraph.ir.ops import OPS
from qgraph.runtime import safetensors
from qgraph.runtime.artefact import ABOUT, GRAPH, WEIGHTS

W = mx.random.normal((512, 512), key=mx.random.key(0)) / 16
X = mx.random.normal((2, 512), key=mx.random.key(1))


def model(x: Any) -> Any:
    h = qg.fori_loop(0, 3, lambda i, h: qg.tanh(qg.quantized_matmul(h, W)), x)
    h, ys = qg.scan(lambda c, s: (c + s, c), h, qg.ones((2, 512)))
    return qg.while_loop(lambda h: h.sum() < -1e9, lambda h: h + 1, h), ys[:, ::2]


def product(x: Any) -> Any:
    return qg.quantized_matmul(x, W)


WITHOUT_REGIONS = [p for p in qg.default_passes(qg.as_target("cpu")) if p.name != "form-regions"]


def saved(fn: Any, folder: Path, passes: Any = None) -> Path:
    return qg.compile(fn, X, target="cpu", passes=passes).save(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (GRAPH, WEIGHTS, ABOUT)}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Of a program whose loops and products are nodes of the graph itself."""
    return files(saved(model, tmp_path_factory.mktemp("saved"), WITHOUT_REGIONS))


@pytest.fixture(scope="module")
def of_regions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Of the same, as it is compiled by default: where regions can run, in one of them."""
    return files(saved(model, tmp_path_factory.mktemp("saved")))


def write(folder: Path, content: dict[str, bytes], *, signed: bool = True) -> Path:
    """The files, with digests of what they are now, as a stranger would write them."""
    about = json.loads(content[ABOUT])
    if signed:
        about["sha256"] = {n: hashlib.sha256(content[n]).hexdigest() for n in (GRAPH, WEIGHTS)}
    for name in (GRAPH, WEIGHTS):
        (folder / name).write_bytes(content[name])
    (folder / ABOUT).write_text(json.dumps(about))
    return folder


def every_node(graph: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for node in graph["nodes"]:
        yield node
        for body in node.get("bodies", ()):
            yield from every_node(body)


def kernel_nodes(graph: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in every_node(graph) if "problem" in node["args"]]


def problem_field(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(graph: dict[str, Any]) -> None:
        for node in kernel_nodes(graph):
            node["args"]["problem"]["$problem"][field] = value

    return edit


def kernel_name(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(graph: dict[str, Any]) -> None:
        for node in kernel_nodes(graph):
            node["args"]["kernel"] = name

    return edit


def loop(op: str, field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(graph: dict[str, Any]) -> None:
        next(n for n in every_node(graph) if n["op"] == op)["args"][field] = value

    return edit


def first_node(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda graph: graph["nodes"][-1].update({field: value})


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    **{
        f"{field}={value}": problem_field(field, value)
        for field, value in [
            *(("n", 100000), ("m", 1), ("k", 64), ("k", 0), ("n", -1), ("n", 2.0)),
            *(("cores", 1000000), ("cores", 0), ("bits", 0), ("bits", 8), ("group_size", 0)),
            *(("experts", 2), ("mode", "int8"), ("backend", "tpu"), ("transpose", 0)),
            *(("dtype", {"$dtype": "i32"}), ("scales_dtype", {"$dtype": "u8"}), ("dtype", None)),
        ]
    },
    **{f"kernel {name}": kernel_name(name) for name in ("shard9999+qmm", "f32+" * 5000, "", "tpu")},
    "turns": loop("fori_loop", "upper", 2**40),
    "turns of a scan": loop("scan", "length", 5),
    "an operand too many": loop("fori_loop", "invariants", {"$tuple": []}),
    "a stream each": first_node("stream", 10**6),
    "a stage": first_node("stage", "later"),
    "packing left to do": first_node("stage", "pack"),
    "a step of 0": loop("getitem", "index", {"$slice": [None, None, 0]}),
    "an op": first_node("op", "system"),
    "a type": first_node("types", ["f32[-1]"]),
    "an output": lambda graph: graph.update(outputs=[{"$value": [-1, 0]}]),
    "a tree": lambda graph: graph.update(in_tree=["leaf", [], []]),
    "no nodes": lambda graph: graph.update(nodes=[]),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_graph_that_is_not_what_its_arrays_are_is_refused(
    artefact: dict[str, bytes], name: str, tmp_path: Path
) -> None:
    data = json.loads(artefact[GRAPH])
    EDITS[name](data["graph"])
    folder = write(tmp_path, {**artefact, GRAPH: json.dumps(data).encode()})
    with pytest.raises(QGraphError):
        qg.load(folder)


@pytest.mark.parametrize(
    "name", [name for name in EDITS if "=" not in name and "kernel" not in name]
)
def test_a_region_is_held_to_the_same(
    of_regions: dict[str, bytes], name: str, tmp_path: Path
) -> None:
    data = json.loads(of_regions[GRAPH])
    EDITS[name](data["graph"])
    folder = write(tmp_path, {**of_regions, GRAPH: json.dumps(data).encode()})
    with pytest.raises(QGraphError):
        qg.load(folder)


@pytest.mark.parametrize("regions", [False, True])
def test_as_it_was_written_it_runs(
    artefact: dict[str, bytes], of_regions: dict[str, bytes], regions: bool, tmp_path: Path
) -> None:
    again = qg.load(write(tmp_path, of_regions if regions else artefact))
    passes = None if regions else WITHOUT_REGIONS
    expected = qg.compile(model, X, target="cpu", passes=passes)(X)
    for a, b in zip(again(X), expected, strict=True):
        assert mx.array_equal(a, b)


def test_fewer_rows_than_declared_are_refused(artefact: dict[str, bytes], tmp_path: Path) -> None:
    folder = write(tmp_path, artefact)
    arrays = safetensors.read(folder / WEIGHTS)
    cut = {name: a[:100] if a.ndim == 2 else a for name, a in arrays.items()}
    mx.save_safetensors(str(folder / WEIGHTS), cut)
    files = {name: (folder / name).read_bytes() for name in artefact}
    with pytest.raises(QGraphError, match="not a whole one"):
        qg.load(write(tmp_path, files))


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, ABOUT])
def test_damage_is_told(artefact: dict[str, bytes], name: str, tmp_path: Path) -> None:
    """Bytes changed and files cut off anywhere: the digests do not match any more."""
    draw = random.Random(0)
    for _ in range(30):
        content = bytearray(artefact[name])
        place = draw.randrange(len(content))
        if draw.random() < 0.3:
            del content[place:]
        else:
            content[place] ^= 1 << draw.randrange(8)
        for file in artefact:
            (tmp_path / file).write_bytes(content if file == name else artefact[file])
        if name == ABOUT and _says_the_same(content, artefact[ABOUT]):
            continue
        with pytest.raises(QGraphError):
            qg.load(tmp_path)


def _says_the_same(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("cut", [0, 4, 8, 50, -1])
def test_weights_cut_off_are_refused_though_signed(
    artefact: dict[str, bytes], cut: int, tmp_path: Path
) -> None:
    folder = write(tmp_path, {**artefact, WEIGHTS: artefact[WEIGHTS][:cut]})
    with pytest.raises(QGraphError, match="cannot be read as weights"):
        qg.load(folder)


def test_any_field_may_hold_anything(artefact: dict[str, bytes], tmp_path: Path) -> None:
    """Some hundred fields changed, each alone: refused in words, or a program all the same."""
    data = json.loads(artefact[GRAPH])
    places = list(_places(data))
    draw = random.Random(1)
    values = [0, -1, 2**40, 1.5, "x", None, True, [], {}, {"$value": [0, 0]}, {"$tuple": []}]
    for _ in range(200):
        changed = json.loads(artefact[GRAPH])
        *way, last = draw.choice(places)
        inner = changed
        for step in way:
            inner = inner[step]
        inner[last] = draw.choice(values)
        try:
            qg.load(write(tmp_path, {**artefact, GRAPH: json.dumps(changed).encode()}))
        except QGraphError:
            continue


def _places(data: Any, way: tuple[Any, ...] = ()) -> Any:
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield (*way, key)
            yield from _places(data[key], (*way, key))


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 16]}}).encode()
    path = tmp_path / WEIGHTS
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(QGraphError, match="takes 4000 bytes"):
        safetensors.read(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 1}', "[" * 100000, '{"format": 1, "graph": 3}']
)
def test_malformed_json_has_a_sentence(text: str) -> None:
    with pytest.raises(QGraphError, match="this is"):
        qg.Graph.from_json(text)


def test_constants_are_of_the_type_that_the_graph_says() -> None:
    arrays: dict[str, mx.array] = {}
    text = to_json(qg.trace(lambda x: x @ W, X), arrays)
    with pytest.raises(QGraphError, match="an array f32"):
        from_json(text, {name: array[:3] for name, array in arrays.items()})


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[::0],
        lambda x: qg.conv1d(x.reshape(1, 256, 4), qg.ones((4, 3, 4)), groups=0),
        lambda x: qg.as_strided(x, (4,), (1,), 1021),
        lambda x: qg.as_strided(x, (4,), (-1,), 2),
        lambda x: qg.as_strided(x, (2**31,), (0,), 0),
        lambda x: qg.split(x, [2**31], axis=1),
        lambda x: x[2],
        lambda x: x[..., -513],
        lambda x: x.at[0, 512].add(1.0),
        lambda x: qg.take(x, 1024),
        lambda x: qg.take(x, 2, axis=0),
        lambda x: qg.slice(x, mx.array([0]), (0,), (3, 512)),
        lambda x: qg.fft.fftn(x, s=[2**40]),
    ],
)
def test_what_ends_the_process_in_mlx_is_an_error(fn: Any) -> None:
    with pytest.raises(ShapeError):
        qg.trace(fn, X)


def test_views_within_their_array_are_as_in_mlx() -> None:
    def views(x: Any) -> Any:
        return (
            qg.as_strided(x, (4, 3), (2, 5), 7),
            qg.as_strided(x, (1024,), None, 0),
            qg.as_strided(x, (3,), (-2,), 1023),
            qg.as_strided(x, (0, 4), (9, 9), 5),
        )

    graph = qg.trace(views, X)
    verify(graph)
    for a, b in zip(qg.compile(graph, target="cpu")(X), views(X), strict=True):
        assert mx.array_equal(a, b)


def test_what_an_earlier_qgraph_saved_still_loads() -> None:
    """`saved` was written by 0.1.0 before folders had digests: a graph, a program, and what the
    program gave there."""
    folder = Path(__file__).parent / "saved"
    x = mx.random.normal((2, 64), key=mx.random.key(1))
    wanted = np.load(folder / "result.npy")
    np.testing.assert_allclose(qg.load(folder / "program")(x), wanted, rtol=1e-5, atol=1e-6)
    graph = qg.Graph.from_json((folder / "graph.json").read_text())
    np.testing.assert_allclose(qg.compile(graph, target="cpu")(x), wanted, rtol=1e-5, atol=1e-6)


INDICES, START = mx.array([1, 0, 1]), mx.array([1])
OUTSIDE: dict[str, Any] = {
    "rows": lambda x: x[INDICES],
    "columns": lambda x: x[..., None, INDICES],
    "put": lambda x: x.at[INDICES].add(1.0),
    "take": lambda x: qg.take(x, INDICES, axis=0),
    "along": lambda x: qg.take_along_axis(x, INDICES.reshape(1, 3), axis=1),
    "in a loop": lambda x: qg.fori_loop(0, 9, lambda i, h: h + x[INDICES][:2], x),
    "slice": lambda x: qg.slice(x, START, (1,), (2, 511)),
    "experts": lambda x: qg.gather_mm(x[None], qg.ones((2, 512, 4)), None, INDICES),
}


@pytest.mark.parametrize("index", [-(2**31), 2**31 - 1, 600, -600])
@pytest.mark.parametrize("name", OUTSIDE)
def test_indices_that_point_outside_are_refused(name: str, index: int, tmp_path: Path) -> None:
    fn = OUTSIDE[name]
    folder = qg.compile(fn, X, target="cpu", passes=[]).save(tmp_path / "saved")
    assert qg.load(folder) is not None
    arrays = {
        key: mx.array([index] * a.size, a.dtype).reshape(a.shape) if a.dtype == mx.int32 else a
        for key, a in safetensors.read(folder / WEIGHTS).items()
    }
    mx.eval(arrays)
    mx.save_safetensors(str(folder / WEIGHTS), arrays)
    files = {file: (folder / file).read_bytes() for file in (GRAPH, WEIGHTS, ABOUT)}
    with pytest.raises(QGraphError, match="holds indices"):
        qg.load(write(folder, files))


def test_every_kernel_of_our_own_has_its_settings_checked() -> None:
    chosen = {name for name, op in OPS.items() if op.kind == "chosen kernels"}
    assert chosen == set(_CHECKS)
