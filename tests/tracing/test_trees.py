"""Leaves of trees are known by their paths, whatever the order in which they come."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph as qg
from qgraph.errors import ControlFlowError, InputError, QGraphError
from qgraph.inspection.tree_json import read_tree, write_tree
from qgraph.tree import Mismatch, flatten

W, B = mx.array([[2.0, 0.0], [0.0, 3.0]]), mx.array([10.0, 20.0])
X = mx.array([1.0, 1.0])


def affine(params: Any, x: Any, n: int = 1, *, s: Any = 1, t: Any = 0) -> Any:
    return (x @ params["w"] + params["b"]) * n * s + t


def program(**options: Any) -> qg.Program:
    return qg.compile(affine, {"w": W, "b": B}, X, 3, s=X, t=X, target="cpu", **options)


def values(result: Any) -> list[float]:
    found: list[float] = result.tolist()
    return found


def test_keys_and_keywords_in_any_order() -> None:
    wanted = values(affine({"w": W, "b": B}, X, 3, s=X, t=X * 2))
    p = program()
    assert values(p({"w": W, "b": B}, X, 3, s=X, t=X * 2)) == wanted
    assert values(p({"b": B, "w": W}, X, 3, t=X * 2, s=X)) == wanted
    assert values(p({"b": np.array(B), "w": W}, X, 3, t=X * 2, s=X)) == wanted
    assert len(p.profile({"b": B, "w": W}, X, 3, t=X * 2, s=X, repeats=1).rows)


def test_checks_by_path() -> None:
    plan = qg.optimize(qg.trace(lambda p, x: x @ p["w"] + p["b"], {"w": W, "b": B}, X))
    plan.check({"b": B, "w": W}, X)
    with pytest.raises(InputError, match=r"p\.w is missing"):
        plan.check({"b": B}, X)
    with pytest.raises(InputError, match=r"x is f32\[2,2\], not f32\[2\]"):
        plan.check({"b": B, "w": W}, W)


def test_prepared_parameters_by_path() -> None:
    wanted = values(affine({"w": W, "b": B}, X, 3, s=X, t=X * 2))
    p = program(parameters=[0])
    for given_params in ({"w": W, "b": B}, {"b": B, "w": W}):
        prepared = p.prepare(given_params)
        assert values(p(prepared, X, 3, s=X, t=X * 2)) == wanted
        assert values(p(prepared, X, 3, t=X * 2, s=X)) == wanted
    for wrong, words in [
        ({"w": W, "c": B}, "params.b is missing"),
        ({"w": W}, "params.b is missing"),
        ({"w": W, "b": B, "c": B}, "params.c is one too many"),
        ({"w": W, "b": 3}, "params.b is 3, not array"),
        ({"w": W, "b": W}, r"params.b is f32\[2,2\], not f32\[2\]"),
        ([W, B], r"params is \[array, array\], not \{w: array, b: array\}"),
    ]:
        with pytest.raises(InputError, match=words):
            p.prepare(wrong)
    with pytest.raises(InputError, match="argument 3 is 100, not 3"):
        p(prepared, X, 100, s=X, t=X)
    with pytest.raises(InputError, match="t is missing"):
        p(prepared, X, 3, s=X)


def test_parameters_among_others_and_with_numbers() -> None:
    def fn(a: Any, b: Any, *, c: Any) -> Any:
        return a["w"] * a["k"] * b["x"] + b["p"] + c

    w = {"w": X * 2, "k": 3}
    b = {"x": X, "p": qg.spec((2,), parameter=True)}
    p = qg.compile(fn, w, b, c=qg.spec((2,), parameter=True), parameters=[0], target="cpu")
    wanted = values(fn(w, {"x": X, "p": X * 5}, c=X * 7))
    prepared = p.prepare(w, {"p": X * 5}, c=X * 7)
    assert values(p(prepared, {"x": X})) == wanted
    assert values(p(w, {"p": X * 5, "x": X}, c=X * 7)) == wanted
    with pytest.raises(InputError, match=r"a\.k is 4, not 3"):
        p.prepare({"w": X, "k": 4}, {"p": X}, c=X)


def test_prepared_parameters_belong_to_a_program_that_lives() -> None:
    prepared = None
    for _ in range(6):  # the address of a program that is gone is soon that of another
        p = qg.compile(affine, {"w": W, "b": B}, X, parameters=[0], target="cpu", passes=[])
        if prepared is not None:
            with pytest.raises(InputError, match="another program"):
                p(prepared, X)
        prepared = p.prepare({"w": W, "b": B})
        del p
        gc.collect()


def test_errors_name_the_path() -> None:
    p = program()
    for args, keywords, words in [
        (({"w": W}, X, 3), {"s": X, "t": X}, "params.b is missing"),
        (({"w": W, "b": B}, X, 3), {"s": X}, "t is missing"),
        (({"w": W, "b": B}, X, 3), {"s": X, "t": X, "u": X}, "u is one too many"),
        (({"w": W, "b": B}, X), {"s": X, "t": X}, "it takes 3 positional arguments, 2 were given"),
        (({"w": W, "b": B}, X, 4), {"s": X, "t": X}, "argument 3 is 4, not 3"),
        (({"w": W, "b": B}, X, 3.0), {"s": X, "t": X}, r"argument 3 is 3\.0, not 3"),
    ]:
        with pytest.raises(InputError, match=words):
            p(*args, **keywords)


def test_numbers_of_another_type_are_other_programs() -> None:
    p = qg.jit(lambda x, n: x * n, target="cpu")
    x = mx.array([2, 3])
    for n in (1, 1.0, True, 0.5, 0.0, float("nan")):
        assert p(x, n).dtype == (x * n).dtype
        assert str(p(x, n)) == str(x * n)
    assert len(p.executables) == 6
    p(x, float("nan"))
    assert len(p.executables) == 6
    p(x, -0.0)
    assert len(p.executables) == 7


def test_jit_compiles_once_for_all_orders() -> None:
    p = qg.jit(affine, target="cpu")
    wanted = values(p({"w": W, "b": B}, X, s=X, t=X * 2))
    assert values(p({"b": B, "w": W}, X, t=X * 2, s=X)) == wanted
    assert len(p.executables) == 1


def swapped(c: Any) -> Any:
    return {"b": c["b"] + c["a"], "a": c["a"] * 2}


def adding(i: Any, c: Any) -> Any:
    return {"b": c["b"] + c["a"], "a": c["a"]}


CARRY = {"a": mx.array(1.0), "b": mx.array(10.0)}


def in_numbers(tree: Any) -> dict[str, float]:
    return {key: array.item() for key, array in tree.items()}


LOOPS: dict[str, Any] = {
    "fori_loop": lambda c: qg.fori_loop(0, 3, lambda i, c: swapped(c), c),
    "while_loop": lambda c: qg.while_loop(lambda c: c["a"] < 8, swapped, c),
    "scan": lambda c: qg.scan(lambda c, _: (swapped(c), None), c, length=3)[0],
    "cond": lambda c: qg.cond(c["a"] > 5, lambda c: c, swapped, c),
    "long loop": lambda c: qg.fori_loop(
        0, 3000, lambda i, c: {"b": c["b"] + c["a"], "a": c["a"]}, c
    ),
}


@pytest.mark.parametrize("case", LOOPS)
def test_what_is_carried_is_matched_by_path(case: str) -> None:
    fn = LOOPS[case]
    p = qg.compile(fn, CARRY, target="cpu")
    assert in_numbers(p(CARRY)) == in_numbers(fn(CARRY))


def test_bodies_that_return_other_trees_name_the_path() -> None:
    with pytest.raises(ControlFlowError, match=r"carry\.b is missing"):
        qg.trace(lambda c: qg.fori_loop(0, 3, lambda i, c: {"a": c["a"]}, c), CARRY)
    with pytest.raises(ControlFlowError, match=r"result\.b is missing"):
        qg.trace(lambda c: qg.cond(c["a"] > 0, lambda c: c, lambda c: {"a": c["a"]}, c), CARRY)


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Cache:
    keys: Any
    offset: int
    more: Any = None

    def __post_init__(self) -> None:
        assert self.keys.shape  # which neither a string nor a number has


class Own(tuple[Any, ...]):
    pass


def test_named_tuples_dataclasses_and_modules_go_in_and_out() -> None:
    def fn(p: Point, c: Cache, o: Own, m: nn.Linear) -> Any:
        assert type(p) is Point
        assert type(c) is Cache
        assert type(o) is Own
        assert type(m) is nn.Linear
        y = qg.addmm(m["bias"], p.x, m["weight"].T) * c.offset + o[0]
        return Point(y, c), Cache(c.keys + p.y, c.offset + 1, [y]), o

    layer = nn.Linear(2, 2)
    args = Point(X[None], X * 3), Cache(X, 2), Own((X,)), layer
    p = qg.compile(fn, *args, target="cpu")
    (y, cache), after, own = p(*args)
    assert np.allclose(y, np.array(layer(X[None])) * 2 + 1)
    assert isinstance(cache, Cache)
    assert cache.offset == 2
    assert cache.keys.tolist() == [1.0, 1.0]
    assert isinstance(after, Cache)
    assert after.offset == 3
    assert len(after.more) == 1
    assert after.keys.tolist() == [4.0, 4.0]
    assert isinstance(own, Own)
    assert p(*args)[0].__class__ is Point
    with pytest.raises(InputError, match=r"p is \(array, array\), not Point\(x: array, y: array\)"):
        p((X[None], X * 3), *args[1:])
    with pytest.raises(InputError, match=r"c\.offset is 3, not 2"):
        p(args[0], Cache(X, 3), *args[2:])
    layer.eval()
    with pytest.raises(InputError, match="m is Linear"):  # not trained any more
        p(*args)


def test_a_module_as_an_argument_of_an_imported_function() -> None:
    layer, other = nn.Linear(2, 3), nn.Linear(2, 3)
    p = qg.compile(qg.from_mlx(lambda m, x: m(x), layer, X), target="cpu")
    assert np.allclose(p(other, X), other(X), atol=1e-6)


def test_trees_in_loops() -> None:
    def fn(p: Point) -> Any:
        return qg.fori_loop(0, 2, lambda i, c: Point(y=c.x + c.y, x=c.x), p)

    p = qg.compile(fn, Point(X, X), target="cpu")
    found = p(Point(X, X))
    assert type(found) is Point
    assert found.y.tolist() == [3.0, 3.0]


LEAVES = st.sampled_from([None, 1, 1.5, True, "a", 2j, b"b", float("inf"), "leaf", "leaf", "leaf"])
KEYS = st.one_of(st.text("abc", max_size=2), st.integers(0, 3))
TREES = st.recursive(
    LEAVES,
    lambda parts: st.one_of(
        st.lists(parts, max_size=3),
        st.lists(parts, max_size=3).map(tuple),
        st.dictionaries(KEYS, parts, max_size=3),
        st.builds(Point, parts, parts),
    ),
    max_leaves=12,
)


def with_arrays(tree: Any, counter: list[int]) -> Any:
    leaves, form = flatten(tree)
    found = []
    for leaf in leaves:
        counter[0] += 1
        found.append(mx.array(counter[0]) if leaf == "leaf" else leaf)
    return form.build(found)


def turned(tree: Any) -> Any:
    """The same tree with the keys of its dicts the other way round."""
    if isinstance(tree, dict):
        return {key: turned(tree[key]) for key in reversed(tree)}
    if isinstance(tree, Point):
        return Point(*map(turned, tree))
    return type(tree)(map(turned, tree)) if isinstance(tree, list | tuple) else tree


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_forms(tree: Any) -> None:
    tree = with_arrays(tree, [0])
    leaves, form = flatten(tree, static=True)
    others, other = flatten(turned(tree), static=True)
    assert [others[i] for i in form.places(other)] == leaves
    assert form.sorted() == other.sorted()
    assert len(form.paths()) == form.count() == len(leaves)
    again = read_tree(json.loads(json.dumps(write_tree(form))))
    assert again == form
    assert flatten(again.build(leaves), static=True)[1] == form


@settings(max_examples=100, deadline=None)
@given(TREES, TREES)
def test_other_forms_are_refused(one: Any, other: Any) -> None:
    (_, a), (_, b) = (flatten(with_arrays(t, [0]), static=True) for t in (one, other))
    if a.sorted() != b.sorted():
        with pytest.raises(Mismatch):
            a.places(b)


def test_saved_programs_take_and_give_classes(tmp_path: Path) -> None:
    p = qg.compile(lambda p: Point(p.y + 1, {2: p.x, "n": 2j}), Point(X, X), target="cpu")
    again = qg.load(p.save(tmp_path / "p"))
    found = again(Point(X, X))
    assert type(found) is Point
    assert found.x.tolist() == [2.0, 2.0]
    assert found.y["n"] == 2j
    assert found.y[2].tolist() == [1.0, 1.0]
    text = (tmp_path / "p" / "graph.json").read_text()
    assert "tests.tracing.test_trees:Point" in text


def test_what_a_file_cannot_hold_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    p = qg.compile(lambda d: {(1, "a"): d[(1, "a")] + 1}, {(1, "a"): X}, target="cpu")
    found = qg.load(p.save(tmp_path / "p"))({(1, "a"): X})
    assert found[(1, "a")].tolist() == [2.0, 2.0]
    p = qg.compile(lambda m: m["weight"] + 1, nn.Linear(2, 2), target="cpu")
    with pytest.raises(QGraphError, match=r"cannot be saved: of an argument: it is an mlx\.nn mod"):
        p.save(tmp_path / "m")
    p = qg.compile(lambda x: {mx.float32: x}, X, target="cpu")
    with pytest.raises(QGraphError, match=r"of a result: its key mlx\.core\.float32 has no form"):
        p.save(tmp_path / "d")
