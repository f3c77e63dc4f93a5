"""A freed function never answers for a new one: docs/decisions/0010."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.kernels.compiled import Compiled

X = mx.arange(6.0).reshape(2, 3)
mx.eval(X)
TURNS = range(2, 14)


def times(k: int) -> Callable[[Any], list[Any]]:
    return lambda x: [x * k]


def after_dead_ones(compiler: Callable[[Any], Callable[..., Any]]) -> Iterator[int]:
    """Yield numbers, each after `x * k` was compiled, called on two threads and freed."""
    for k in TURNS:
        dead = compiler(times(k))
        mx.eval(dead(X))

        def call(dead: Any = dead) -> None:
            with mx.stream(mx.new_thread_local_stream(mx.cpu)):
                mx.eval(dead(X))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        del dead, call, thread
        gc.collect()
        yield k


def test_programs() -> None:
    for k in after_dead_ones(lambda fn: qg.jit(fn, target="cpu")):
        assert mx.array_equal(qg.compile(times(-k), X, target="cpu")(X)[0], X * -k)


def test_what_others_left_behind() -> None:
    for k in after_dead_ones(mx.compile):
        # Several at once, so that one of them takes the dead one's address.
        for compiled in [Compiled(times(-k)) for _ in range(8)]:
            assert mx.array_equal(compiled.call(X)[0], X * -k)


def test_every_thread_has_its_own() -> None:
    compiled = Compiled(times(3))
    functions = [compiled.call]
    thread = threading.Thread(target=lambda: functions.append(compiled.call))
    thread.start()
    thread.join()
    assert len(set(map(id, functions))) == 2


def test_functions_without_arguments() -> None:
    assert Compiled(lambda: [mx.ones(2)]).call()[0].tolist() == [1, 1]
