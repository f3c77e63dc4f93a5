"""The CUDA sources of attention, run by a CPU, against float64; `tests/gpu` runs them on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph
from tests.support.compiler import loaded, needs_compiler
from tests.support.faults import planted

pytestmark = needs_compiler
HERE = Path(__file__).parent
ROOM = Path(qgraph.__file__).parent / "kernels" / "attention"
SOURCES = "attention_call", "attention_warp", "decode_attention", "cached_attention"
POINTERS = ("q", "keys", "values", "mask", "sinks", "k", "v", "tail_keys", "tail_values", "last",
            "first", "place", "tail_positions", "freqs", "parts", "y", "new_keys", "new_values",
            "new_positions", "offset")  # fmt: skip
NUMBERS = ("batch", "heads", "kv_heads", "queries", "length", "splits", "window", "last_step",
           "first_step", "dims", "traditional")  # fmt: skip
STEPS = ("mask_batch", "mask_head", "mask_query", "mask_key")


class Given(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in NUMBERS),
        *((name, ctypes.c_longlong) for name in STEPS),
        *((name, ctypes.c_float) for name in ("scale", "base", "rope_scale")),
    ]


@dataclass(frozen=True)
class Kernel:
    """One of `attention_on_cpu.cpp`, in its order."""

    dtype: mx.Dtype
    dim: int = 64
    value_dim: int = 64
    mask: mx.Dtype | None = None
    tail: int = 0
    number: int = 0


KERNELS = [
    replace(kernel, number=number)
    for number, kernel in enumerate([
        Kernel(mx.bfloat16), Kernel(mx.float16, 128, 128), Kernel(mx.float32),
        Kernel(mx.bfloat16, 192, 128), Kernel(mx.bfloat16, mask=mx.bool_),
        Kernel(mx.float16, mask=mx.float16), Kernel(mx.float16, mask=mx.float32),
        Kernel(mx.bfloat16, tail=1), Kernel(mx.float32, tail=1),
        Kernel(mx.float16, 128, 128, tail=8), Kernel(mx.float32, tail=20),
    ])
]  # fmt: skip
PLAIN = [k for k in KERNELS if not k.tail and k.mask is None]
MASKED = [k for k in KERNELS if k.mask is not None]
COPYING = [k for k in KERNELS if k.tail == 1]
WITH_TAILS = [k for k in KERNELS if k.tail > 1]
FAR = 1 << 30
TOLERANCE = {mx.bfloat16: 1.9e-3, mx.float16: 2.4e-4, mx.float32: 2e-6}
"""Of the norm of a result: half a unit in the last place of its dtype, about."""


def built(folder: Path, change: Callable[[str], str] = str, *flags: str) -> Any:
    """The sources as a library, after what a test does to them."""
    text = "".join((ROOM / f"{name}.cuh").read_text() for name in SOURCES)
    (folder / "attention.cuh").write_text(change(text))
    (folder / "attention.cpp").write_text('#include "attention_on_cpu.cpp"')
    library = loaded(folder / "attention.cpp", f"-I{HERE}", f"-I{folder}", *flags)
    library.attention.restype = library.merge.restype = ctypes.c_bool
    library.attention.argtypes, library.merge.argtypes = [Given, ctypes.c_int], [Given]
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return built(tmp_path_factory.mktemp("attention"))


class Arrays:
    """Arrays of random numbers in a dtype: as float64, and as bytes that a kernel reads."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.held: list[Any] = []

    def make(self, dtype: mx.Dtype, *shape: int) -> Any:
        return self.rounded(self._rng.normal(size=shape), dtype)

    @staticmethod
    def rounded(numbers: Any, dtype: mx.Dtype) -> Any:
        return np.array(mx.array(numbers).astype(dtype).astype(mx.float32), np.float64)

    def at(self, numbers: Any, dtype: mx.Dtype, skip: int = 0) -> int:
        """The address of numbers as a kernel reads them, `skip` of them after one of 16 bytes."""
        made = mx.array(numbers).astype(dtype)
        if dtype == mx.bool_:
            made = made.astype(mx.uint8)
        elif dtype.size == 2:
            made = made.view(mx.uint16)
        flat = np.array(made).ravel()
        size, step = flat.nbytes, flat.itemsize
        room = np.zeros(size + 16 + skip * step, np.uint8)
        start = -room.ctypes.data % 16 + skip * step
        room[start : start + size] = flat.view(np.uint8)
        self.held.append(room)
        return int(room.ctypes.data + start)


def read(address: int, dtype: mx.Dtype, *shape: int) -> Any:
    raw = {2: np.uint16, 4: np.uint32}[dtype.size]
    count = int(np.prod(shape))
    found = np.frombuffer(ctypes.string_at(address, count * dtype.size), raw).reshape(shape)
    if dtype == mx.int32:
        return found.view(np.int32)
    return np.array(mx.array(found).view(dtype).astype(mx.float32), np.float64)


def softmax(q: Any, k: Any, v: Any, seen: Any, added: Any = 0.0, sinks: Any = None) -> Any:
    """All (batch, heads, …); `seen` (batch, 1, queries, keys) or like it; scaled by 0.125."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a, group, axis=1) for a in (k, v))
    scores = 0.125 * np.einsum("bhqd,bhkd->bhqk", q, k) + added
    scores = np.where(seen, scores, -np.inf)
    scores = np.where(seen.any(-1, keepdims=True), scores, 0.0)  # none: all weigh the same
    if sinks is not None:
        sink = np.broadcast_to(sinks.reshape(1, -1, 1, 1), (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sink], axis=-1)
    with np.errstate(invalid="ignore"):
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)
        return np.einsum("bhqk,bhkd->bhqd", p[..., : k.shape[2]], v)


def near(got: Any, want: Any, dtype: mx.Dtype, times: float = 1.0) -> bool:
    return bool(np.linalg.norm(got - want) <= times * TOLERANCE[dtype] * np.linalg.norm(want))


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 1
    length: int = 100
    splits: int = 1
    last: Any = None
    first: Any = None
    window: int = 0
    sinks: bool = False
    hidden: Any = None
    """(batch, 1, queries, keys): what a mask of -infinity hides, in place of a random one."""


CASES = {
    "one key": Case(length=1),
    "a part of a tile": Case(length=9, splits=3),
    "many tiles": Case(length=300, last=[250, 250]),
    "many splits": Case(length=300, splits=5, last=[299, 299]),
    "more splits than tiles": Case(length=40, splits=7, last=[17, 17]),
    "seen by none": Case(length=70, splits=2, last=[-1, -1]),
    "beyond the end": Case(length=70, last=[1000, 1000]),
    "padded on the left": Case(length=150, splits=2, last=[120, 120], first=[17, 64]),
    "an end each": Case(batch=3, length=150, last=[120, 3, 149], first=[17, 0, 140]),
    "a window": Case(length=200, splits=3, last=[150, 150], window=37),
    "a window and padding": Case(length=200, last=[150, 150], window=37, first=[0, 130]),
    "several queries": Case(queries=5, length=90, last=[60, 60], splits=2),
    "queries, window": Case(queries=8, length=90, last=[60, 61], window=16),
    "queries before the first key": Case(queries=4, length=50, last=[1, 1]),
    "nine heads": Case(heads=9, kv_heads=1, length=70),
    "twenty rows": Case(heads=10, kv_heads=2, queries=4, length=70, splits=2),
    "sinks": Case(length=70, sinks=True),
    "sinks, splits": Case(queries=3, length=90, splits=3, sinks=True, last=[88, 88]),
}


def by_kernel(library: Any, kernel: Kernel, case: Case, *, skip: int = 0, seed: int = 0) -> Any:
    """What the kernel gives, and float64."""
    arrays = Arrays(seed)
    b, h, kv, n, length = case.batch, case.heads, case.kv_heads, case.queries, case.length
    q = arrays.make(kernel.dtype, b, h, n, kernel.dim)
    keys = arrays.make(kernel.dtype, b, kv, length, kernel.dim)
    values = arrays.make(kernel.dtype, b, kv, length, kernel.value_dim)
    given = Given(batch=b, heads=h, kv_heads=kv, queries=n, length=length, splits=case.splits,
                  window=case.window, scale=0.125, last_step=1, first_step=1)  # fmt: skip
    last = np.full(b, length - 1) if case.last is None else np.array(case.last)
    at, end = np.arange(length), last[:, None, None, None] - np.arange(n - 1, -1, -1)[:, None] + 1
    seen = at < end
    if case.window:
        seen = seen & (at >= end - case.window)
    if case.first is not None:
        first = np.array(case.first)
        given.first = arrays.at(first, mx.int32)
        seen = seen & (at >= first[:, None, None, None])
    if case.last is not None:
        given.last = arrays.at(last, mx.int32)
    added: Any = 0.0
    if case.hidden is not None:
        assert kernel.mask is not None
        added = np.where(case.hidden, -np.inf, 0.0)
        given.mask = arrays.at(added, kernel.mask)
        given.mask_batch, given.mask_query, given.mask_key = n * length, length, 1
    elif kernel.mask is not None:
        shape = (b, 1, n, length)
        given.mask_batch, given.mask_query, given.mask_key = n * length, length, 1
        if kernel.mask == mx.bool_:
            hidden = arrays.make(mx.float32, *shape) > 0.5
            given.mask = arrays.at(~hidden, mx.bool_)
            seen = seen & ~hidden
        else:
            added = arrays.make(kernel.mask, *shape)
            given.mask = arrays.at(added, kernel.mask)
    sinks = arrays.make(kernel.dtype, h) if case.sinks else None
    if sinks is not None:
        given.sinks = arrays.at(sinks, kernel.dtype)
    given.q = arrays.at(q, kernel.dtype, skip)
    unseen = ~seen.any((1, 2))[:, None, :, None]
    for name, x in (("keys", keys), ("values", values)):
        hidden = np.where(unseen & seen.any((1, 2, 3))[:, None, None, None], np.nan, x)
        shown = x if kernel.mask is not None or not seen.any(-1).all() else hidden
        setattr(given, name, arrays.at(shown, kernel.dtype, skip))
    given.y = arrays.at(np.zeros((b, h, n, kernel.value_dim)), kernel.dtype)
    given.parts = arrays.at(
        np.full((b * h * n, case.splits, kernel.value_dim + 2), 7e7), mx.float32
    )
    assert library.attention(given, kernel.number), "threads wait for one another"
    y = read(given.y, kernel.dtype, b, h, n, kernel.value_dim)
    return y, softmax(q, keys, values, seen, added, sinks)


def test_numbers(library: Any) -> None:
    wrong = []
    for kernel in PLAIN:
        for name, case in CASES.items():
            if not near(*by_kernel(library, kernel, case), kernel.dtype):
                wrong.append((name, str(kernel.dtype), kernel.dim))
    assert not wrong


@pytest.mark.parametrize("kernel", MASKED, ids=lambda k: f"{k.mask} on {k.dtype}")
def test_masks(library: Any, kernel: Kernel) -> None:
    for case in (
        Case(length=70, splits=2, last=[60, 61]),
        Case(queries=3, length=70),
        CASES["sinks"],
    ):
        assert near(*by_kernel(library, kernel, case), kernel.dtype)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kernel", MASKED[1:], ids=lambda k: f"{k.mask} on {k.dtype}")
def test_rows_that_a_mask_hides_all_of(library: Any, kernel: Kernel, splits: int) -> None:
    """MLX makes such masks of truths on CUDA: queries of tokens that pad a row on the left see
    nothing.  They get 0, and so are numbers where others do not see them as keys."""
    padding = np.array([0, 3])[:, None, None, None]
    at = np.arange(24)
    seen = (at <= at[:, None]) & (at >= padding)
    case = Case(queries=24, length=24, last=[46, 46], splits=splits, hidden=~seen)
    y, want = by_kernel(library, kernel, case)
    there = np.broadcast_to(seen.any(-1)[..., None], want.shape)
    assert near(np.where(there, y, 0), np.where(there, want, 0), kernel.dtype)
    assert (y[~there] == 0).all()


@pytest.mark.parametrize("kernel", PLAIN, ids=lambda k: str(k.dtype))
def test_arrays_at_any_address(library: Any, kernel: Kernel) -> None:
    for skip in (1, 3):
        case = Case(length=90, splits=2)
        assert near(*by_kernel(library, kernel, case, skip=skip), kernel.dtype)


def rotate(x: Any, position: int, dims: int, traditional: bool) -> Any:
    """By the formula of RoFormer (arXiv 2104.09864)."""
    half, y = dims // 2, x.copy()
    angle = position * 1e4 ** -(np.arange(half) / max(1, half))
    first = 2 * np.arange(half) if traditional else np.arange(half)
    second = first + (1 if traditional else half)
    y[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    y[..., second] = x[..., first] * np.sin(angle) + x[..., second] * np.cos(angle)
    return y


class Cache:
    """A cache in float64 and as the kernel has it: whole, or with a tail beside it."""

    def __init__(self, kernel: Kernel, batch: int, heads: int, kv_heads: int, length: int) -> None:
        self.kernel, self.arrays = kernel, Arrays(length)
        self.heads = heads
        shape = (batch, kv_heads, length, kernel.dim)
        self.now = [self.arrays.make(kernel.dtype, *shape) for _ in "kv"]
        self.cache = [a.copy() for a in self.now]
        tail = (batch, kv_heads, kernel.tail, kernel.dim)
        self.tail = [np.full(tail, np.nan) for _ in "kv"]
        self.positions = np.full(kernel.tail, -1)

    def step(
        self, library: Any, position: int, last: int, splits: int, offset: int | None = None,
        sinks: bool = False, window: int = 0, **rope: Any,
    ) -> Any:  # fmt: skip
        """A token through the kernel, and float64."""
        kernel, arrays, dtype = self.kernel, self.arrays, self.kernel.dtype
        batch, kv, length, dim = self.cache[0].shape
        q = arrays.make(dtype, batch, self.heads, dim)
        k, v = (arrays.make(dtype, batch, kv, dim) for _ in "kv")
        with_tail = kernel.tail > 1
        given = Given(
            batch=batch, heads=self.heads, kv_heads=kv, queries=1, length=length, splits=splits,
            scale=0.125, base=np.log2(1e4), rope_scale=1.0, window=window, **rope,
        )  # fmt: skip
        for name, numbers in zip(("q", "k", "v", "keys", "values"), (q, k, v, *self.cache),
                                 strict=True):  # fmt: skip
            setattr(given, name, arrays.at(numbers, dtype))
        given.place, given.last = arrays.at([position], mx.int32), arrays.at([last], mx.int32)
        if offset is not None:
            given.offset = arrays.at([offset], mx.int32)
        alone = arrays.make(dtype, self.heads) if sinks else None
        if alone is not None:
            given.sinks = arrays.at(alone, dtype)
        after = self.tail if with_tail else self.cache
        if with_tail:
            given.tail_keys, given.tail_values = (arrays.at(a, dtype) for a in self.tail)
            given.tail_positions = arrays.at(self.positions, mx.int32)
            given.new_positions = arrays.at(self.positions * 0 + 77, mx.int32)
        given.new_keys, given.new_values = (arrays.at(a * 0 + 77, dtype) for a in after)
        given.y = arrays.at(np.zeros((batch, self.heads, dim)), dtype)
        parts = np.full((batch * self.heads, splits, dim + 2), 7e7)
        given.parts = arrays.at(parts, mx.float32)
        assert library.attention(given, kernel.number), "threads wait for one another"
        after = [read(p, dtype, *after[0].shape) for p in (given.new_keys, given.new_values)]
        if with_tail:
            self.tail, self.positions = after, read(given.new_positions, mx.int32, kernel.tail)
        else:
            self.cache = after
        turn = position if offset is None else offset
        q, k = (rotate(x, turn, given.dims, bool(given.traditional)) for x in (q, k))
        if 0 <= position < length:
            self.now[0][:, :, position], self.now[1][:, :, position] = k, v
        at = np.arange(length)
        seen = ((at <= last) & (at > last - (window or FAR)))[None, None, None]
        want = softmax(q[:, :, None], *self.now, seen, sinks=alone)
        return read(given.y, dtype, batch, self.heads, dim), want[:, :, 0]

    def merged(self, library: Any) -> list[Any]:
        """The keys and the values by `merge_tail`, which is built for float32 and 20 rows."""
        batch, kv, length, _ = self.cache[0].shape
        found = []
        for cache, tail in zip(self.cache, self.tail, strict=True):
            given = Given(batch=batch, kv_heads=kv, length=length)
            given.keys, given.tail_keys = (self.arrays.at(a, mx.float32) for a in (cache, tail))
            given.tail_positions = self.arrays.at(self.positions, mx.int32)
            given.new_keys = self.arrays.at(cache * 0 + 77, mx.float32)
            assert library.merge(given)
            found.append(read(given.new_keys, mx.float32, *cache.shape))
        return found


TURNS = ({"dims": 0}, {"dims": 64}, {"dims": 32, "traditional": 1})


@pytest.mark.parametrize("kernel", COPYING, ids=lambda k: str(k.dtype))
@pytest.mark.parametrize("length", [1, 33, 90])
def test_a_token_into_a_copy(library: Any, kernel: Kernel, length: int) -> None:
    for splits in (1, 5):
        for turn in TURNS:
            cache = Cache(kernel, 2, 4, 2, length)
            for position, last in ((length // 2, length // 2), (length - 1, length - 1),
                                   (length, -1), (-1, length), (0, length - 1)):  # fmt: skip
                got, want = cache.step(library, position, last, splits, **turn)
                assert near(got, want, kernel.dtype, 2)
                for ours, now in zip(cache.cache, cache.now, strict=True):
                    assert near(ours, now, kernel.dtype)


@pytest.mark.parametrize("kernel", WITH_TAILS, ids=lambda k: str(k.dtype))
@pytest.mark.parametrize("splits", [1, 4])
def test_tokens_into_a_tail(library: Any, kernel: Kernel, splits: int) -> None:
    """Positions that count up, that go back, and that lie outside, until the tail is full."""
    cache = Cache(kernel, 2, 6, 2, 90)
    for position in (40, 41, 42, 41, 90, 42, 43, 17):
        got, want = cache.step(library, position, max(position % 90, 43), splits, dims=64)
        assert near(got, want, kernel.dtype, 2), position
    assert sorted(cache.positions.tolist())[-8:-1] == [17, 40, 41, 41, 42, 42, 43]


@pytest.mark.parametrize("kernel", [COPYING[1], WITH_TAILS[0]], ids=lambda k: str(k.dtype))
def test_a_token_in_the_place_of_another(library: Any, kernel: Kernel) -> None:
    """As in a ring: it is turned by its own number, and stored where one was that is forgotten."""
    cache = Cache(kernel, 2, 4, 2, 33)
    for offset in (32, 33, 34, 70):
        got, want = cache.step(library, offset % 33, 32, 2, offset, dims=64)
        assert near(got, want, kernel.dtype, 2), offset


@pytest.mark.parametrize("kernel", [COPYING[0], WITH_TAILS[-1]], ids=lambda k: str(k.dtype))
@pytest.mark.parametrize("splits", [1, 4])
def test_sinks_and_a_window(library: Any, kernel: Kernel, splits: int) -> None:
    """Of a token that is stored too."""
    for more in ({"sinks": True}, {"window": 9}, {"sinks": True, "window": 40}):
        cache = Cache(kernel, 2, 6, 2, 90)
        for position in (3, 60, 61, 89):
            got, want = cache.step(library, position, position, splits, dims=64, **more)
            assert near(got, want, kernel.dtype, 2), (position, more)


def test_a_tail_is_merged(library: Any) -> None:
    for positions in ((3, 4, 5, 4, 90, 89, -1, 0), (1, 2)):
        cache = Cache(WITH_TAILS[-1], 2, 6, 2, 90)
        for position in positions:
            cache.step(library, position, 80, 1, dims=64)
        for got, want in zip(cache.merged(library), cache.now, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_what_is_no_number(library: Any) -> None:
    """A key that is none spoils the results that see it, and no others."""
    cache = Cache(COPYING[1], 1, 2, 1, 100)
    cache.cache[0][0, 0, 7, 3] = cache.now[0][0, 0, 7, 3] = np.nan
    got, _ = cache.step(library, 20, 20, 2)
    assert np.isnan(got).all()
    got, want = cache.step(library, 6, 6, 2)
    assert near(got, want, mx.float32, 2)


FAULTS = {
    "turned by its place": ("token.offset ? token.offset[0] : position", "position"),
    "the last tile": ("min(share, tiles - from)", "min(share, tiles - 1 - from)"),
    "weights are rounded": ("OF_WEIGHTS = 2", "OF_WEIGHTS = 1"),
    "what was summed does not shrink": ("*= keep[i % 2]", "*= 1"),
    "hidden values count": ("if (position(tile, value_key(i, t)) >= 0) continue;", "continue;"),
    "windows end too late": ("end - call.window)", "end - call.window - 1)"),
    "padding is seen": ("call.first ? call.first[place.batch * call.first_step] : 0", "0"),
    "the first sinks for all": ("row / call.queries % call.heads", "0"),
    "what the tail replaces is seen": ("if (shared.at[j] == at) return -1;", ";"),
    "a row stored twice is seen twice": ("replaced |= j > i && at == mine;", ""),
    "the caller's tail is read": (
        "tail.keys = new_keys, ",
        "tail.keys = token.tail_keys + head * rows * F::D, ",
    ),
    "no barrier after the token is stored": (
        "  }\n  __syncthreads();\n  if (in_tail)", "  }\n  if (in_tail)",
    ),
    "no barrier after the angles": (
        "limits, shared);\n  __syncthreads();\n#pragma", "limits, shared);\n#pragma",
    ),
    "merged in the wrong order": ("for (int j = 0; j < TAIL; j++) {",
                                  "for (int j = TAIL - 1; j >= 0; j--) {"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(tmp_path: Path, fault: str) -> None:
    assert not _finds_nothing(built(tmp_path, planted(*FAULTS[fault]), "-DFIRST_AND_LAST"))


def _finds_nothing(library: Any) -> bool:
    """Do the tests of two kernels, the first and the last, pass?"""
    for case in CASES.values():
        if not near(*by_kernel(library, KERNELS[0], case), mx.bfloat16):
            return False
    try:
        test_tokens_into_a_tail(library, WITH_TAILS[-1], 4)
        test_a_token_in_the_place_of_another(library, WITH_TAILS[-1])
        test_a_tail_is_merged(library)
    except AssertionError:
        return False
    return True
