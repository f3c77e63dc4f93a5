"""Caches: whatever their files hold, measurements are told and kept, and libraries are whole."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
from hypothesis import strategies as st

from qgraph.kernels.base import Problem
from qgraph.kernels.choice.cache import FORMAT, Cache, _digest, device_key
from qgraph.kernels.choice.cost import problem_key
from qgraph.kernels.cpu import building
from tests.fuzz.surface import Surface

PROBLEM = Problem(
    m=1, n=64, k=64, dtype=mx.float32, mode="affine", bits=4, group_size=64,
    transpose=True, scales_dtype=mx.float32, backend="cpu", arch="", cores=2,
)  # fmt: skip
DEVICE, KEY = device_key(PROBLEM), problem_key(PROBLEM)

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.sampled_from(["qmm", "simd", "format", "devices", 1, 1e300, 10**400]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["format", "devices", DEVICE, KEY, "qmm", "simd"]), inner,
                        max_size=3),
    ),
    max_leaves=8,
)  # fmt: skip


def _signed(devices: Any) -> Any:
    """As the cache writes it, so that what is within is read."""
    return {"format": FORMAT, "devices": devices, "sha256": _digest(devices)}


def _times(inner: Any) -> Any:
    return _signed({DEVICE: {KEY: inner}})


def _cut(text: str, place: int, new: str) -> bytes:
    place %= max(1, len(text))
    return (text[:place] + new + text[place + 1 :]).encode()


FULL = json.dumps(_times({"qmm": 3.0, "simd": 2.0}))
CONTENT: st.SearchStrategy[bytes] = st.one_of(
    st.binary(max_size=40),
    JSON.map(lambda data: json.dumps(data).encode()),
    JSON.map(lambda data: json.dumps(_times(data)).encode()),
    JSON.map(lambda data: json.dumps(_signed(data)).encode()),
    JSON.map(lambda data: json.dumps(_signed({DEVICE: data})).encode()),
    st.builds(_cut, st.just(FULL), st.integers(0, 200), st.text(max_size=3)),
    st.integers(0, 200).map(lambda end: FULL[:end].encode()),
    st.sampled_from([b"[" * 100_000, b'{"format":1,"devices":' + b'{"a":' * 100_000]),
)


def _measurements(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "kernels.json"
        path.write_bytes(content)
        found = Cache(path).get(PROBLEM)
        assert all(type(us) in (int, float) and 0 < us < math.inf for us in found.values()), found
        cache = Cache(path)
        cache.put(PROBLEM, {"qmm": 5.0})
        again = Cache(path).get(PROBLEM)
        assert again["qmm"] == 5.0, again
        assert set(found) <= set(again), "a measurement was lost"


def _library(case: Any) -> None:
    """What is not, byte for byte, what was built is built again, never loaded."""
    built, changes, end = case
    signed = built + building.DIGEST + hashlib.sha256(built).digest()
    damaged = bytearray(signed)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    content = bytes(damaged[: len(damaged) - end])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        path.write_bytes(content)
        assert building.is_whole(path) is (content == signed)


KINDS = {
    "measurements": (CONTENT, _measurements),
    "library": (
        st.tuples(
            st.binary(max_size=100),
            st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3),
            st.sampled_from([0, 0, 1, 32, 48]),
        ),
        _library,
    ),
}


def check(case: Any) -> None:
    kind, given = case
    KINDS[kind][1](given)


CACHES = Surface(
    st.one_of(*(st.tuples(st.just(kind), cases) for kind, (cases, _) in KINDS.items())),
    check,
    daily=200,
)
