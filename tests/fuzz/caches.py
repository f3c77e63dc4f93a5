"""The cache of measurements: whatever its file holds, it answers, and can be written again."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
from hypothesis import strategies as st

from qgraph.kernels.base import Problem
from qgraph.kernels.choice.cache import Cache, device_key
from qgraph.kernels.choice.cost import problem_key
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


def _times(inner: Any) -> Any:
    return {"format": 1, "devices": {DEVICE: {KEY: inner}}}


def _cut(text: str, place: int, new: str) -> bytes:
    place %= max(1, len(text))
    return (text[:place] + new + text[place + 1 :]).encode()


FULL = json.dumps(_times({"qmm": 3.0, "simd": 2.0}))
CONTENT: st.SearchStrategy[bytes] = st.one_of(
    st.binary(max_size=40),
    JSON.map(lambda data: json.dumps(data).encode()),
    JSON.map(lambda data: json.dumps(_times(data)).encode()),
    JSON.map(lambda data: json.dumps({"format": 1, "devices": data}).encode()),
    JSON.map(lambda data: json.dumps({"format": 1, "devices": {DEVICE: data}}).encode()),
    st.builds(_cut, st.just(FULL), st.integers(0, 200), st.text(max_size=3)),
    st.integers(0, 200).map(lambda end: FULL[:end].encode()),
    st.sampled_from([b"[" * 100_000, b'{"format":1,"devices":' + b'{"a":' * 100_000]),
)


def check(content: bytes) -> None:
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


CACHES = Surface(CONTENT, check, daily=200)
