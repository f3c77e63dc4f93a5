"""Random programs as data, for hypothesis to build, shrink and print, and as functions to trace.

A program takes weights and a tensor (ROWS, K) and chains products with weights in all forms,
element-wise ops, loops and branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from hypothesis import strategies as st

import qgraph as qg
from tests.support.fusion import FORMATS, random

K, ROWS, DEPTH = 128, 3, 2
FLOATS = [random(K, K, seed=i) / 12 for i in range(3)]
PACKED = {
    (i, form): mx.quantize(w, **settings)
    for i, w in enumerate(FLOATS)
    for form, settings in FORMATS.items()
}
mx.eval(FLOATS, list(PACKED.values()))
XS = random(2, K, seed=9)

Tensor = Any
Step = Any


@dataclass(frozen=True)
class Product:
    """`tanh` of a product, or of a look-up, with a weight in `format`, from `origin`."""

    spelling: str
    weight: int
    format: str
    origin: str


@dataclass(frozen=True)
class Pointwise:
    name: str


@dataclass(frozen=True)
class Residual:
    """Adds the value of so many steps back."""

    back: int


@dataclass(frozen=True)
class Loop:
    """A `fori_loop`, `while_loop` or `scan` around a program."""

    kind: str
    turns: int
    body: tuple[Step, ...]


@dataclass(frozen=True)
class Cond:
    yes: tuple[Step, ...]
    no: tuple[Step, ...]


@dataclass(frozen=True)
class WeightIn:
    """A weight as a spelling sees it: floats, packed parts, and how to make them dense."""

    floats: Tensor
    parts: tuple[Tensor, ...]
    settings: dict[str, Any]
    made: Tensor = None
    """Dense, from outside of the loop."""

    def dense(self) -> Tensor:
        if self.made is not None:
            return self.made
        return qg.dequantize(*self.parts, **self.settings, dtype=mx.float32)

    def faked(self) -> Tensor:
        parts = qg.quantize(qg.tensor(self.floats) * 0.5, **self.settings)
        return qg.dequantize(*parts, **self.settings, dtype=mx.float32)


_PICKED = mx.array([1, 5, 1])
SPELLINGS: dict[str, Callable[[Tensor, WeightIn], Tensor]] = {
    "automatic": lambda h, w: qg.quantized_matmul(h, w.floats, **w.settings),
    "automatic, columns": lambda h, w: qg.quantized_matmul(
        h, w.floats, transpose=False, **w.settings),
    "packed": lambda h, w: qg.quantized_matmul(h, *w.parts, **w.settings),
    "T": lambda h, w: h @ w.dense().T,
    "plain": lambda h, w: h @ w.dense(),
    "on the left": lambda h, w: (w.dense() @ h.T).T,
    "addmm": lambda h, w: qg.addmm(h, h, w.dense().swapaxes(0, 1), alpha=0.5),
    "einsum": lambda h, w: qg.einsum("mk,nk->mn", h, w.dense()),
    "tensordot": lambda h, w: qg.tensordot(h, w.dense(), [[1], [1]]),
    "reshape": lambda h, w: h @ w.dense().reshape(4, K // 4, K).reshape(K, K).T,
    "split": lambda h, w: qg.concatenate([h @ p.T for p in qg.split(w.dense(), 2)], axis=-1),
    "joined": lambda h, w: h @ qg.concatenate([w.dense()[:16], w.dense()[16:]]).T,
    "split of product": lambda h, w: qg.concatenate(qg.split(h @ w.dense().T, 2, axis=1), 1),
    "faked": lambda h, w: h @ w.faked().T,
    "looked up": lambda h, w: h + qg.take(w.dense(), _PICKED, axis=0),
    "experts": lambda h, w: qg.gather_mm(
        h[:, None, :], qg.expand_dims(w.dense(), 0).swapaxes(1, 2),
        rhs_indices=mx.zeros((ROWS,), mx.uint32))[:, 0],
    "scaled": lambda h, w: (h * 2.0) @ w.dense().T * 0.5,
    "scaled weight": lambda h, w: h @ (w.dense() * 0.5).T,
    "refused": lambda h, w: h @ (w.dense() + w.dense()).T * 0.5,
    "float": lambda h, w: h @ qg.swapaxes(w.floats, 0, 1),
    "float einsum": lambda h, w: qg.einsum("mk,kn->mn", h, w.floats),
    "dense too": lambda h, w: h @ w.dense().T + qg.mean(w.dense(), axis=0),
}  # fmt: skip
POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda h: qg.tanh(h * 1.5 + 0.25),
    "silu": lambda h: h * qg.sigmoid(h),
    "leaky": lambda h: qg.maximum(h, 0.1 * h) + (1.0 - 1.0),
    "where": lambda h: qg.where(h > 0, h, qg.square(h)),
    "centred": lambda h: h - qg.mean(h, axis=-1, keepdims=True),
}


def products(formats: list[str]) -> st.SearchStrategy[Step]:
    return st.builds(
        Product,
        st.sampled_from(list(SPELLINGS)),
        st.integers(0, len(FLOATS) - 1),
        st.sampled_from(formats),
        st.sampled_from(
            ["constant", "parameter", "carried", "scanned", "indexed", "operand", "outside"]
        ),
    )


def programs(formats: list[str], depth: int = 0) -> st.SearchStrategy[tuple[Step, ...]]:
    """One to three steps; loops and branches to a depth of `DEPTH`."""
    product = products(formats)
    step = st.one_of(
        product,
        st.builds(Pointwise, st.sampled_from(list(POINTWISE))),
        st.builds(Residual, st.integers(0, 2)),
    )
    if depth < DEPTH:
        inner = programs(formats, depth + 1)
        kinds = st.sampled_from(["fori_loop", "while_loop", "scan", "scan reversed"])
        loops = st.builds(Loop, kinds, st.integers(0, 2), inner)
        step = st.one_of(product, step, loops, st.builds(Cond, inner, inner))
    return st.lists(step, min_size=1, max_size=3).map(tuple)


def products_in(program: tuple[Step, ...]) -> Iterator[Product]:
    """Those in loops and branches too."""
    for step in program:
        match step:
            case Product():
                yield step
            case Loop(_, _, body):
                yield from products_in(body)
            case Cond(yes, no):
                yield from products_in((*yes, *no))


Weights = tuple[list[mx.array], dict[str, list[list[mx.array]]]]


def parameters(formats: list[str]) -> Weights:
    """The weights of `origin` "parameter": floats, and the packed parts by format."""
    packed = {f: [list(PACKED[i, f]) for i in range(len(FLOATS))] for f in formats}
    return FLOATS, packed


def run(program: tuple[Step, ...], given: Weights, h: Tensor) -> Tensor:
    """Trace the program."""
    seen = [h]
    for step in program:
        seen.append(_step(step, given, seen))
    return seen[-1]


def _step(step: Step, given: Weights, seen: list[Tensor]) -> Tensor:
    h = seen[-1]
    match step:
        case Product():
            return qg.tanh(_product(step, given, h))
        case Pointwise(name):
            return POINTWISE[name](h)
        case Residual(back):
            return (h + seen[max(0, len(seen) - 1 - back)]) * 0.5
        case Cond(yes, no):
            branches = [lambda h, p=p: run(p, given, h) for p in (yes, no)]
            return qg.cond(qg.sum(h[:, :8]) > 0, *branches, h)
        case Loop("fori_loop", turns, body):
            return qg.fori_loop(0, turns, lambda i, h: run(body, given, h), h)
        case Loop("while_loop", turns, body):
            start = (h, mx.array(0))
            more = lambda c: c[1] < turns  # noqa: E731
            return qg.while_loop(more, lambda c: (run(body, given, c[0]), c[1] + 1), start)[0]
        case Loop(kind, _, body):
            turn = lambda c, x: (run(body, given, c + x * 0.1), c[0])  # noqa: E731
            h, ys = qg.scan(turn, h, XS, reverse=kind == "scan reversed")
            return h + qg.sum(ys, axis=0) * 0.1
    raise TypeError(step)


def _product(step: Product, given: Weights, h: Tensor) -> Tensor:
    settings, spell = FORMATS[step.format], SPELLINGS[step.spelling]
    if step.origin in ("constant", "parameter"):
        floats, parts = FLOATS[step.weight], PACKED[step.weight, step.format]
        if step.origin == "parameter":
            floats, parts = given[0][step.weight], tuple(given[1][step.format][step.weight])
        return spell(h, WeightIn(floats, parts, settings))

    if step.origin == "outside":
        outside = WeightIn(FLOATS[step.weight], PACKED[step.weight, step.format], settings)
        weight = replace(outside, made=outside.dense())
        return qg.fori_loop(0, 2, lambda i, h: spell(h, weight), h)
    pair = [(FLOATS[i], PACKED[i, step.format]) for i in range(2)]
    return _in_loop(step.origin, h, pair, lambda h, w: spell(h, WeightIn(w[0], w[1], settings)))


def _in_loop(
    origin: str, h: Tensor, pair: list[Any], apply: Callable[[Tensor, Any], Tensor]
) -> Tensor:
    """The product with two weights that a loop carries, scans or indexes, or a branch is given."""
    if origin == "operand":
        return qg.cond(qg.sum(h[:, :8]) > 0, apply, lambda h, w: h, h, pair[0])
    if origin == "carried":
        swap = lambda i, c: (apply(c[0], c[1]), c[2], c[1])  # noqa: E731
        return qg.fori_loop(0, 2, swap, (h, *pair))[0]
    (a, parts), (b, others) = pair
    stacks = mx.stack([a, b]), tuple(mx.stack(p) for p in zip(parts, others, strict=True))
    if origin == "scanned":
        return qg.scan(lambda h, w: (apply(h, w), h[0]), h, stacks)[0]
    floats, packed = stacks
    index = lambda i: (qg.tensor(floats)[i], tuple(qg.tensor(p)[i] for p in packed))  # noqa: E731
    return qg.fori_loop(0, 2, lambda i, h: apply(h, index(i)), h)
