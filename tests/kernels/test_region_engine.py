"""The engine of regions: order, jumps, threads, processes, mistakes; its C++ under sanitizers."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgraph.kernels.cpu import building, library
from qgraph.kernels.cpu.header import header
from qgraph.kernels.cpu.region import Region, RegionError, instructions
from tests.support.compiler import needs_compiler
from tests.support.regions import Array, Chain, Steps

pytestmark = needs_compiler
h = header()


def add(
    steps: Steps, x: Array, number: float, y: Array | None = None, flags: int = h.BARRIER
) -> None:
    """y (or x itself) = x + number."""
    chain = Chain(x)
    const = chain.do(
        "CONST", x.dtype, value=float(number) if x.dtype == np.float32 else int(number)
    )
    chain.to(chain.do("ADD", x.dtype, 0, const), x if y is None else y).step(steps)
    steps.steps[-1].flags = flags


def jump(steps: Steps, target: int, if_zero: Array | None = None) -> None:
    steps.add(h.JUMP, h.Jump(steps.ref(if_zero), target))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_loop_of_jumps(threads: int) -> None:
    x, left = np.zeros(5000, np.float32), np.array(7, np.int32)
    s = Steps()
    jump(s, 4, left)
    add(s, x, 2)
    add(s, left, -1, flags=0)
    jump(s, 0)
    add(s, x, 0.5)
    s.run(threads)
    assert left == 0
    np.testing.assert_array_equal(x, 14.5)


def test_a_barrier_lies_between_phases() -> None:
    """Each of many steps reads what tasks of the one before have written, in another order."""
    x, y = np.zeros(40_000, np.float32), np.zeros(40_000, np.float32)
    s = Steps()
    for i in range(200):
        add(s, x[::-1] if i % 2 else y[::-1], 1, y if i % 2 else x)
    region = s.made()
    for _ in range(10):
        x[:] = y[:] = 0
        region.run([a.ctypes.data for a in s.arrays], 2)
        assert x.min() == x.max() == 199


def test_steps_that_every_thread_does_for_itself() -> None:
    x = np.arange(100, dtype=np.float32)
    ys = [np.zeros(20_000, np.float32) for _ in range(2)]
    s = Steps()
    private = np.zeros(100, np.float32)  # stands for a buffer of each thread
    add(s, x, 1, private, flags=h.BARRIER | h.EACH_THREAD)
    for y in ys:
        chain = Chain(private.reshape(1, 100), shape=(200, 100))
        chain.to(chain.do("NEGATIVE", np.float32, 0), y.reshape(200, 100)).step(s)
        s.steps[-1].flags = 0
    number = next(i for i, a in enumerate(s.arrays) if a is private)
    s.buffers[number] = h.Buffer(h.PRIVATE, 0, 0, 400)
    region = Region(s.buffers, s.steps, bytes(s.args), pointers=len(s.arrays), private_bytes=448)
    for _ in range(50):
        for y in ys:
            y[:] = 0
        region.run([a.ctypes.data for a in s.arrays], 2)
        for y in ys:
            np.testing.assert_array_equal(y.reshape(200, 100), np.tile(-(x + 1), (200, 1)))
    assert not private.any()


def test_arena_and_fixed_buffers() -> None:
    x, weight, y = (np.arange(1000, dtype=np.float32) for _ in range(3))
    s, room = Steps(), np.zeros(1000, np.float32)
    add(s, weight, 1, room)
    chain = Chain(x, room)
    chain.to(chain.do("MULTIPLY", np.float32, 0, 1), y).step(s)
    order = [id(a) for a in s.arrays]
    s.buffers[order.index(id(weight))] = h.Buffer(h.FIXED, 0, weight.ctypes.data, 4000)
    s.buffers[order.index(id(room))] = h.Buffer(h.ARENA, 0, 64, 4000)
    region = Region(s.buffers, s.steps, bytes(s.args), pointers=4, arena_bytes=4096)
    nanoseconds = (ctypes.c_int64 * 2)()
    region.run([a.ctypes.data for a in s.arrays], 2, nanoseconds)
    np.testing.assert_array_equal(y, x * (weight + 1))
    assert all(0 < n < 10**9 for n in nanoseconds)
    assert 4096 <= region.memory(1) < region.memory(2) < 50_000


def test_mistakes_have_words() -> None:
    x = np.zeros(10, np.float32)
    s = Steps()
    add(s, x, 1)
    buffers, steps, args = s.buffers, s.steps, bytes(s.args)

    def made(*change: Any, **more: Any) -> None:
        given: dict[str, Any] = {"pointers": 1, **more}
        b, t, a = [*change, buffers, steps, args][:3] if change else (buffers, steps, args)
        Region(b, t, a, **given)

    with pytest.raises(RegionError, match="buffer 0 does not lie in its memory"):
        made(pointers=0)
    with pytest.raises(RegionError, match="buffer 0 does not lie in its memory"):
        made([h.Buffer(h.ARENA, 0, 32, 40)], steps, args, arena_bytes=128)
    with pytest.raises(RegionError, match="step 0: an input reaches bytes 0 to 40 of buffer 0"):
        made([h.Buffer(h.GIVEN, 0, 0, 39)], steps, args)
    with pytest.raises(RegionError, match="step 0: kind 99 is none"):
        made(buffers, [h.Step(99, 0, 0)], args)
    with pytest.raises(RegionError, match="step 0: its arguments at"):
        made(buffers, steps, args[:64])
    with pytest.raises(RegionError, match="it jumps to step 9 of 1"):
        made(buffers, [h.Step(h.JUMP, 0, 0)], bytes(h.Jump(h.Ref(-1), 9)))
    region = Region(
        [h.Buffer(h.ARENA, 0, 0, 40), *buffers], steps, args, pointers=1, arena_bytes=1 << 60
    )
    with pytest.raises(RegionError, match="too little memory"):
        region.run([x.ctypes.data], 2)


def test_operations_on_what_they_do_not_take() -> None:
    x = np.zeros(10, np.float32)
    for op, operands, words in (
        ("LOGICAL_AND", (0, 0), "does not take dtype"),
        ("ADD", (0, 7), "value 7 is none"),
        ("SIN", (-1,), "value -1 is none"),
        ("WHERE", (0, 0, 0), "is given dtype"),
    ):
        chain = Chain(x)
        chain.to(chain.do(op, np.float32, *operands), x)
        with pytest.raises(RegionError, match=words):
            chain.step(Steps()).made()


def looping() -> tuple[Steps, Array, Array]:
    x, left = np.zeros(30_000, np.float32), np.array(0, np.int32)
    s = Steps()
    jump(s, 4, left)
    add(s, x, 1)
    add(s, left, -1, flags=0)
    jump(s, 0)
    return s, x, left


def test_one_region_from_many_threads() -> None:
    s, *_ = looping()
    region = s.made()

    def call(number: int) -> bool:
        for _ in range(20):
            x, left = np.zeros(30_000, np.float32), np.array(20 + number, np.int32)
            given = {id(s.arrays[0]): left, id(s.arrays[1]): x}
            region.run([given[id(a)].ctypes.data for a in s.arrays], 2)
            if not (x == 20 + number).all():
                return False
        return True

    with ThreadPoolExecutor(6) as callers:
        assert all(callers.map(call, range(6)))


def test_on_a_small_stack() -> None:
    results: list[float] = []

    def call() -> None:
        s, x, left = looping()
        left[...] = 5
        s.run(2)
        results.append(float(x.sum()))

    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(60)
    finally:
        threading.stack_size(before)
    assert results == [150_000.0]


def test_a_child_after_fork_and_a_process_on_one_core() -> None:
    script = (
        "import os\nfrom tests.kernels.test_region_engine import looping\n"
        "s, x, left = looping()\nregion = s.made()\n"
        "def run():\n"
        "    x[:], left[...] = 0, 50\n"
        "    region.run([a.ctypes.data for a in s.arrays], 2)\n"
        "    return bool((x == 50).all())\n"
        "assert run()\nchild = os.fork()\n"
        "if not child: os._exit(0 if run() and run() else 3)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "assert all(run() for _ in range(20))\nprint('all')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "all\n", done.stderr


def test_signals_in_the_midst_of_it() -> None:
    """Their handlers run between calls; a system call that one ends is made again."""
    seen: list[int] = []
    s, x, left = looping()
    region = s.made()
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        until = time.monotonic() + 30
        while len(seen) < 20 and time.monotonic() < until:
            x[:], left[...] = 0, 50
            region.run([a.ctypes.data for a in s.arrays], 2)
            assert (x == 50).all()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) >= 20


def test_without_room_for_threads_or_memory() -> None:
    """The caller does all; where the arena is too much there are words, and later calls run."""
    script = (
        "import resource, numpy as np\n"
        "from tests.kernels.test_region_engine import add, looping, h, Steps\n"
        "from qgraph.kernels.cpu.region import Region, RegionError\n"
        "s, x, left = looping()\nregion = s.made()\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 10),) * 2)\n"
        "for _ in range(20):\n"
        "    x[:], left[...] = 0, 50\n"
        "    region.run([a.ctypes.data for a in s.arrays], 2)\n"
        "    assert (x == 50).all()\n"
        "given = Steps()\nadd(given, np.zeros(10, np.float32), 1)\n"
        "large = Region([h.Buffer(h.ARENA, 0, 0, 40), *given.buffers], given.steps,"
        " bytes(given.args), pointers=1, arena_bytes=1 << 28)\n"
        "try:\n    large.run([given.arrays[0].ctypes.data], 2)\n"
        "except RegionError as error:\n    print(error)\n"
        "x[:], left[...] = 0, 50\n"
        "region.run([a.ctypes.data for a in s.arrays], 2)\nassert (x == 50).all()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert "too little memory" in done.stdout, done.stderr


def test_another_processor_has_a_library_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home folder may be shared: the name of a library holds the instructions it may use."""

    def compiled(texts: Any, folder: Path) -> Path:
        (folder / "kernels.so").write_bytes(b"code")
        return folder / "kernels.so"

    monkeypatch.setattr(library, "_folder", lambda: tmp_path)
    monkeypatch.setattr(library, "_compiled", compiled)
    here = library._built()
    assert any("avx" in str(line) or "asimd" in str(line) for line in building._processor()[1:])
    monkeypatch.setattr(building, "_processor", lambda: ("x86_64", "flags : sse2"))
    assert library._built() != here
    assert len(list(tmp_path.glob("*.so"))) == 2


def test_a_library_cut_short_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []

    def compiled(texts: Any, folder: Path) -> Path:
        built.append(1)
        (folder / "kernels.so").write_bytes(b"code " * 100)
        return folder / "kernels.so"

    monkeypatch.setattr(library, "_folder", lambda: tmp_path)
    monkeypatch.setattr(library, "_compiled", compiled)
    place = library._built()
    assert place == library._built()
    assert len(built) == 1
    place.write_bytes(place.read_bytes()[:-20])
    assert library._built() == place
    assert len(built) == 2


def test_what_it_is_built_for() -> None:
    assert instructions() in ("avx512", "avx2", "neon", "generic")


# ---- The sources under sanitizers, and for another processor ------------------------------------

SOURCES = Path(library.__file__).parent


PROGRAM = Path(__file__).parent / "regions_in_threads.cpp"


def compiled(folder: Path, compiler: str, *flags: str) -> list[str]:
    """Object files of all sources and of the program."""

    def one(file: Path) -> str:
        made = str(folder / f"{file.stem}.o")
        command = [compiler, "-std=c++17", "-pthread", *flags, f"-I{SOURCES}"]
        subprocess.run([*command, "-c", str(file), "-o", made], check=True, capture_output=True)
        return made

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(one, [*sorted(SOURCES.glob("*.cpp")), PROGRAM]))


# What they check for makes the compiler slow, the more so the better it optimizes.
@pytest.mark.parametrize(("sanitizer", "level"), [("thread", "-Og"), ("address,undefined", "-O0")])
def test_under_sanitizers(sanitizer: str, level: str, tmp_path: Path) -> None:
    flags = ["-march=native", level, "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    objects = compiled(tmp_path, library.COMPILER, *flags)
    made = str(tmp_path / "program")
    subprocess.run([library.COMPILER, *flags, "-pthread", *objects, "-o", made], check=True)
    done = subprocess.run([made], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[:3000]


CROSS = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"{CROSS} is not installed")
def test_for_neon(tmp_path: Path) -> None:
    """Compiled by a cross compiler, and run where there is an emulator."""
    made = str(tmp_path / "program")
    objects = compiled(tmp_path, CROSS, "-O1", "-Wall", "-Werror")
    subprocess.run([CROSS, "-static", "-pthread", *objects, "-o", made], check=True)
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("it compiles; qemu-aarch64, to run it, is not installed")
    done = subprocess.run(
        ["qemu-aarch64", made], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[:3000]
