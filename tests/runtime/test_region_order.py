"""Launches of regions of several threads: each call ends before another thread's begins."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

from qgraph.runtime.regions.cuda import order


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    order.leave()
    with mx.stream(mx.cpu):
        yield
    order.leave()


def call(program: order.InOrder) -> bool:
    """Was the call's result computed when it came back?"""
    before = mx.get_active_memory()
    (result,) = program.call(mx.zeros((1 << 20,)))
    mx.synchronize()
    made = mx.get_active_memory() - before
    assert mx.all(result == 1).item()
    return made >= 4 << 20


def test_a_call_waits_only_where_another_thread_may_have_launches() -> None:
    program = order.InOrder(lambda arrays, counters, last: [arrays[0] + 1, last])
    with ThreadPoolExecutor(1) as other:

        def there(work: object) -> bool:
            def on_cpu() -> bool:
                with mx.stream(mx.cpu):
                    return call(program)

            return other.submit(on_cpu if work is call else order.leave).result() or False

        assert not call(program)
        assert there(call), "the second thread waits"
        assert call(program), "and so does the first, from then on"
        there(order.leave)
        assert not call(program), "until the second has left"
        assert there(call), "and comes again"
        there(order.leave)
