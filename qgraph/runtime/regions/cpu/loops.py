"""Loops and branches inside a region: jumps over phases.

What a loop carries lies in buffers of its own, which each turn's results are copied to at its end;
what a turn updates in place (a cache) is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ....ir.graph import Graph, Node, Value
from ....ir.loops import body_inputs, turns
from ..arrays import Array, Buffer
from ..steps import Loop, Step, Work
from ..unknown import Unknown
from .chains import Chain
from .refs import h, ref
from .translate import Translator, kind


@kind("scan")
def scan(t: Translator, node: Node) -> None:
    length, reverse = int(node.args["length"]), bool(node.args["reverse"])
    count = t.filled(length - 1 if reverse else 0, mx.int32)
    step, end = (-1, -1) if reverse else (1, length)
    xs = [t.array(v) for v in node.args["xs"]]
    carried = _carried(t, node)
    ys = [t.table.array(v.shape, v.dtype) for v in node.outputs[len(carried) :]]
    turn = _Body(t, node, 0)
    own = turn.own
    inner = turn.translator([*carried, *(None for _ in xs)], carried)
    for value, x in zip(own[len(carried) :], xs, strict=True):
        got = inner.places[value] = t.table.array(value.shape, value.dtype)
        start = {0: h.Start(ref(count), x.strides[0], length - 1)}
        slices = (1, *value.shape)
        inner.copy(x.sliced(0, 0, 1), got.broadcast(slices), node, reads=[count],
                   source_starts=start)  # fmt: skip
    inner.run()
    results = [inner.array(v) for v in turn.body.outputs]
    inner.finish()
    last = _last(inner.work)
    for y, result in zip(ys, results[len(carried) :], strict=True):
        start = {0: h.Start(ref(count), y.strides[0], length - 1)}
        goal = y.sliced(0, 0, 1)
        inner.copy(result.broadcast(goal.shape), goal, node, reads=[count], goal_starts=start)
    last = max(last, _last(inner.work))
    _carry(inner, carried, results[: len(carried)], node, last)
    inner.work.append(_count(t, count, step, last + 1))
    test, go_on = _test(t, count, end, reverse)
    _close(t, node, turn, [test], go_on, inner.work, [*carried, *ys])


@kind("fori_loop")
def fori_loop(t: Translator, node: Node) -> None:
    lower, upper = node.args["lower"], node.args["upper"]
    count = t.filled(lower if isinstance(lower, int) else 0, mx.int32)
    if isinstance(lower, Value):
        t.copy(_as_int32(t, lower), count, node, after=0)
    end = _as_int32(t, upper) if isinstance(upper, Value) else int(upper)
    carried = _carried(t, node)
    turn = _Body(t, node, 0)
    inner = turn.translator([count, *carried], carried)
    inner.run()
    results = [inner.array(v) for v in turn.body.outputs]
    inner.finish()
    last = _last(inner.work)
    _carry(inner, carried, results, node, last)
    inner.work.append(_count(t, count, 1, last + 1))
    test, go_on = _test(t, count, end, False)
    _close(t, node, turn, [test], go_on, inner.work, carried)


@kind("while_loop")
def while_loop(t: Translator, node: Node) -> None:
    carried = _carried(t, node)
    test, turn = _Body(t, node, 0), _Body(t, node, 1)
    asked = test.translator(carried, [])
    asked.run()
    go_on = asked.array(test.body.outputs[0])
    asked.finish()
    test.restore()
    inner = turn.translator(carried, carried)
    inner.run()
    results = [inner.array(v) for v in turn.body.outputs]
    inner.finish()
    _carry(inner, carried, results, node, _last(inner.work))
    _close(t, node, turn, asked.work, go_on, inner.work, carried)


@kind("cond")
def cond(t: Translator, node: Node) -> None:
    pred = t.array(node.operand("pred"))
    if pred.size != 1:
        raise Unknown("a condition of several elements")
    chain = Chain((), 0)
    other = t.table.array((), mx.bool_)
    yes = chain.read(pred.reshaped(()) or pred)
    if pred.dtype != mx.bool_:
        yes = chain.add(h.OP_CAST, mx.bool_, (yes,))
    chain.outputs.append((other, chain.add(h.OP_LOGICAL_NOT, mx.bool_, (yes,))))
    chain.level = pred.buffer.ready + 1
    other.buffer.ready = chain.level
    t.work.append(t.chain_step(chain))
    results = [t.table.array(v.shape, v.dtype) for v in node.outputs]
    given = [t.array(v) for v in node.args["carried"]]
    for which, go_on in enumerate((pred, other)):
        branch = _Body(t, node, which)
        inner = branch.translator(given, [])
        inner.run()
        found = [inner.array(v) for v in branch.body.outputs]
        inner.finish()
        for result, array in zip(results, found, strict=True):
            inner.copy(array, result, node)
        _close(t, node, branch, [], go_on, inner.work, results, once=True)
    t.places.update(zip(node.outputs, results, strict=True))


class _Body:
    """A body, translated apart: within it all that is outside is ready."""

    def __init__(self, t: Translator, node: Node, which: int) -> None:
        self.body: Graph = node.bodies[which]
        self.own, shared = body_inputs(node)[which]
        self._outer = t
        self._given = {inner: t.array(outer) for inner, outer in shared}
        self._ready: list[tuple[Buffer, int]] = []

    def translator(self, own: Sequence[Array | None], owned: Sequence[Array]) -> Translator:
        self._ready = [(b, b.ready) for b in self._outer.table.buffers]
        for buffer, _ in self._ready:
            buffer.ready = -1
        places = {v: a for v, a in zip(self.own, own, strict=True) if a is not None}
        buffers = {a.buffer for a in owned}
        mine = {v for v, a in places.items() if a.buffer in buffers}
        return Translator(self.body, self._outer.table, places | self._given, mine)

    def restore(self) -> None:
        for buffer, ready in self._ready:
            buffer.ready = ready

    @property
    def before(self) -> set[Buffer]:
        """The buffers that were there before the body."""
        return {buffer for buffer, _ in self._ready}


def touched(work: Sequence[Work]) -> set[Buffer]:
    """Every buffer that steps, and those of their loops, read or write."""
    found: set[Buffer] = set()
    for each in work:
        if isinstance(each, Step):
            found.update(each.reads, each.writes)
        else:
            found |= touched(each.test) | touched(each.turn) | {each.go_on.buffer}
    return found


def _carried(t: Translator, node: Node) -> list[Array]:
    """Buffers of what a loop carries, filled with what it starts from."""
    return [t.own(value, node) for value in node.args["carried"]]


def _last(work: Sequence[Work]) -> int:
    return max((each.level for each in work), default=-1)


def _carry(
    inner: Translator, carried: Sequence[Array], results: Sequence[Array], node: Node, last: int
) -> None:
    """Copy a turn's results to where the next one reads them, when nothing reads those any more."""
    places = {c.buffer for c in carried}
    moves = []
    for array, goal in zip(results, carried, strict=True):
        if array.buffer is goal.buffer and array.is_whole:
            continue
        if array.buffer in places:  # it would be written over before it is read
            array = inner.copied(array, node)
        moves.append((array, goal))
    for array, goal in moves:
        inner.copy(array, goal, node, after=last + 1)


def _count(t: Translator, count: Array, step: int, level: int) -> Step:
    """The counter's step."""
    chain = Chain((), level)
    chain.outputs.append((count, chain.add(h.OP_ADD, mx.int32,
                          (chain.read(count), chain.constant(step, mx.int32)))))  # fmt: skip
    return t.chain_step(chain)


def _test(t: Translator, count: Array, end: int | Array, down: bool) -> tuple[Step, Array]:
    """Is the counter before its end?"""
    chain = Chain((), 0)
    go_on = t.table.array((), mx.bool_)
    limit = chain.read(end) if isinstance(end, Array) else chain.constant(end, mx.int32)
    op = h.OP_GREATER if down else h.OP_LESS
    chain.outputs.append((go_on, chain.add(op, mx.int32, (chain.read(count), limit))))
    return t.chain_step(chain), go_on


def _as_int32(t: Translator, value: Value) -> Array:
    array = t.array(value)
    if array.dtype != mx.int32 or array.size != 1:
        raise Unknown("bounds that are not int32")
    return array.reshaped(()) or array


def _close(
    t: Translator,
    node: Node,
    turn: _Body,
    test: list[Any],
    go_on: Array,
    work: list[Work],
    results: Sequence[Array],
    *,
    once: bool = False,
) -> None:
    """Put the loop after all that it touches; its results are ready after it."""
    turn.restore()
    used = touched(work) | touched(test) | {go_on.buffer, *(r.buffer for r in results)}
    level = 1 + max((buffer.ready for buffer in used & turn.before), default=-1)
    t.work.append(Loop(level, test, go_on, work, once, turns(node) or 1))
    for result in results:
        result.buffer.ready = level
    if not once:
        t.places.update(zip(node.outputs, results, strict=True))
