"""Trees of arguments: a program is called with the tree it was traced on, or with another.

Whatever the call, the answer is that of the function itself on the same arguments, or an
`InputError`; keys in another order are no other tree.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from hypothesis import strategies as st

import qgraph as qg
from qgraph.errors import InputError
from tests.fuzz.surface import Surface


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclasses.dataclass
class Record:
    a: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a type; its elements are numbers that tell it from others."""

    shape: tuple[int, ...]
    dtype: str
    seed: int

    def array(self) -> mx.array:
        return mx.arange(self.seed, self.seed + 2)[: max(self.shape, default=1)].reshape(
            self.shape
        ).astype(getattr(mx, self.dtype))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments to trace on, those to call with, and how.

    Attributes:
        traced, called: pairs of positional and keyword arguments.
        way: "call", "jit", "prepare" or "carry".
    """

    traced: tuple[list[Any], dict[str, Any]]
    called: tuple[list[Any], dict[str, Any]]
    way: str


ARRAYS = (mx.array, qg.Tensor)
LEAVES = st.builds(
    Leaf,
    st.sampled_from([(2,), (1,), ()]),
    st.sampled_from(["float32", "int32", "float16"]),
    st.integers(0, 9),
)
STATICS = st.sampled_from([None, 0, 1, 1.0, True, False, 0.0, -0.0, "a", "", 2**40, float("inf")])
KEYS = st.sampled_from(["a", "b", "w", "0", "a.b", "", "x y", 0, 1, True, None])


def _inner(trees: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(trees, max_size=3),
        st.lists(trees, max_size=3).map(tuple),
        st.dictionaries(KEYS, trees, max_size=3),
        st.builds(Pair, trees, trees),
        st.builds(Record, trees, trees),
    )


TREE = st.recursive(st.one_of(LEAVES, LEAVES, STATICS), _inner, max_leaves=6)
ARGUMENTS = st.tuples(
    st.lists(TREE, max_size=3),
    st.dictionaries(st.sampled_from(["s", "t", "u"]), TREE, max_size=2),
)


def paths(tree: Any, way: str = "") -> list[tuple[str, Any]]:
    """Leaves and statics with their paths, in an order of their own."""
    if isinstance(tree, dict):
        items: list[tuple[Any, Any]] = [(f"[{key!r}]", tree[key]) for key in tree]
    elif isinstance(tree, Record):
        items = [(".a", tree.a), (".b", tree.b)]
    elif isinstance(tree, list | tuple):
        items = [(f"[{i}]", item) for i, item in enumerate(tree)]
    else:
        return [(way, tree)]
    kind = (f"{way}:{type(tree).__name__}", len(items))
    return [kind, *(found for step, item in items for found in paths(item, way + step))]


def shaped(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """The tree with `leaf` of each leaf and static."""
    if isinstance(tree, dict):
        return {key: shaped(item, leaf) for key, item in tree.items()}
    if isinstance(tree, Record):
        return Record(shaped(tree.a, leaf), shaped(tree.b, leaf))
    if isinstance(tree, Pair):
        return Pair(*(shaped(item, leaf) for item in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(shaped(item, leaf) for item in tree)
    return leaf(tree)


def arrays(tree: Any) -> Any:
    return shaped(tree, lambda x: x.array() if isinstance(x, Leaf) else x)


def _plus(array: Any, number: int) -> Any:
    """Their sum by an addition that `mx.compile` builds nothing for, as it would for a number."""
    return array + mx.full(array.shape, number, array.dtype)


def function(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """By path each array plus a number that belongs to the path and to what stands beside it."""
    given = paths((args, kwargs))
    beside = [(path, leaf) for path, leaf in given if not isinstance(leaf, ARRAYS)]
    words = repr(sorted(beside, key=lambda pair: pair[0]))

    def mark(path: str) -> int:
        return zlib.crc32((path + words).encode()) % 97

    found = {path: _plus(leaf, mark(path)) for path, leaf in given if isinstance(leaf, ARRAYS)}
    return found | {"mark": mx.array(mark(""))}


@st.composite
def edited(draw: st.DrawFn, tree: Any, chance: float = 0.1) -> Any:
    """The tree with keys in another order, and here and there something else."""
    if draw(st.floats(0, 1)) < chance:
        return draw(TREE)
    if isinstance(tree, dict):
        keys = draw(st.permutations(list(tree)))
        made = {key: draw(edited(tree[key], chance)) for key in keys}
        if draw(st.floats(0, 1)) < chance and made:
            made[draw(KEYS)] = made.pop(draw(st.sampled_from(list(made))))
        return made
    if isinstance(tree, list) and draw(st.floats(0, 1)) < chance:
        return [*tree, draw(TREE)] if draw(st.booleans()) else tree[:-1]
    if isinstance(tree, Record):
        return Record(draw(edited(tree.a, chance)), draw(edited(tree.b, chance)))
    if isinstance(tree, Pair):
        return Pair(draw(edited(tree.a, chance)), draw(edited(tree.b, chance)))
    if isinstance(tree, list | tuple):
        return type(tree)(draw(edited(item, chance)) for item in tree)
    return tree


@st.composite
def cases(draw: st.DrawFn) -> Case:
    args, kwargs = draw(ARGUMENTS)
    chance = draw(st.sampled_from([0.0, 0.1]))
    called = [draw(edited(arg, chance)) for arg in args]
    if draw(st.floats(0, 1)) < chance:
        called = called[:-1] if draw(st.booleans()) else [*called, draw(TREE)]
    keys = draw(st.permutations(list(kwargs)))
    named = {key: draw(edited(kwargs[key], chance)) for key in keys}
    if draw(st.floats(0, 1)) < chance and named:
        named.pop(draw(st.sampled_from(list(named))))
    way = draw(st.sampled_from(["call", "jit", "prepare", "carry"]))
    return Case((args, kwargs), (called, named), way)


def _is_same(one: Any, other: Any) -> bool:
    """Are these the same up to the order of keys, and of the elements of arrays?"""

    def known(tree: Any) -> list[str]:
        return sorted(
            f"{path} {leaf.shape} {leaf.dtype}" if isinstance(leaf, Leaf)
            else f"{path} {type(leaf).__name__} {leaf!r}"
            for path, leaf in paths(tree)
        )  # fmt: skip

    return known(one) == known(other)


def check(case: Case) -> None:
    if case.way == "carry":
        return _check_carried(case)
    args, kwargs = arrays(case.traced)
    given, named = arrays(case.called)
    wanted = function(*given, **named)
    same = _is_same(case.traced, case.called)
    try:
        if case.way == "jit":
            same = True  # it compiles for whatever comes
            program = qg.jit(function, passes=[])
            _equal(program(*args, **kwargs), function(*args, **kwargs))
            found = program(*given, **named)
        elif case.way == "prepare" and given and args and _leaves(case.traced[0][0]):
            program = qg.compile(function, *args, parameters=[0], passes=[], **kwargs)
            found = program(program.prepare(given[0]), *given[1:], **named)
        else:
            program = qg.compile(function, *args, passes=[], **kwargs)
            found = program(*given, **named)
    except InputError:
        assert not same, "the same tree was refused"
        return
    _equal(found, wanted)


def _leaves(tree: Any) -> list[Leaf]:
    return [leaf for _, leaf in paths(tree) if isinstance(leaf, Leaf)]


def _check_carried(case: Case) -> None:
    """A loop whose body returns its tree with keys in another order."""
    start, turned = (shaped(case.traced[0], _only_arrays), shaped(case.called[0], _only_arrays))
    if not _is_same(start, turned) or not _leaves(start):
        return
    order = [path for path, leaf in paths(turned) if isinstance(leaf, Leaf)]

    def turn(tree: Any) -> Any:
        given = dict(paths(tree))
        steps = iter([_plus(given[path], number) for number, path in enumerate(order, 1)])
        return shaped(turned, lambda leaf: leaf if leaf is None else next(steps))

    carried = arrays(start)
    loop = qg.compile(lambda s: qg.fori_loop(0, 1, lambda i, s: turn(s), s), carried, passes=[])
    found, wanted = dict(paths(loop(carried))), dict(paths(turn(carried)))
    _equal({path: found[path] for path in order}, {path: wanted[path] for path in order})


def _only_arrays(leaf: Any) -> Any:
    return leaf if isinstance(leaf, Leaf) else None


def _equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys(), f"{sorted(found)} for {sorted(wanted)}"
    for path, array in found.items():
        same = array.dtype == wanted[path].dtype and mx.array_equal(array, wanted[path])
        assert same, f"{path}: {array} for {wanted[path]}"


TREES = Surface(cases(), check, daily=60)
