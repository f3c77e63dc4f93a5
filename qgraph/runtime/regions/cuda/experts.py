"""Experts in a region: products whose matrices a router in the same region chooses.

A row and an expert of it are a *pair*.  Products by experts give each pair a row of its own, and
what follows them elementwise is as for other products; the last are added up, each times its
weight, as they are finished: a row's experts are then the parts of one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from ....ir.graph import Graph, Node, Value
from ....ir.ops import setting
from ....kernels.base import HALF, Problem
from ....kernels.matmul.tiled.experts import TiledGather
from ..unknown import Unknown
from .expressions import (
    FLOATS,
    OPERATIONS,
    Added,
    Apply,
    Expression,
    Gathered,
    Leaf,
    Part,
    in_order,
)
from .routing import Router, Routing

OP = "packed_gather"
MOST_PAIRS = 32
"""Each reads a matrix of its own: of more pairs, several share one."""


@dataclass(frozen=True)
class ByExpert:
    """Which matrices a product takes.

    Attributes:
        chosen: the router's array of them.
        rows: of the region.
        experts: of a row.
        added: are a row's results added up?
        own: has x a row of each pair?
    """

    chosen: str
    rows: int
    experts: int
    added: bool
    own: bool

    @property
    def times(self) -> int:
        """How often all columns of a matrix are computed."""
        return self.rows if self.added else self.pairs

    @property
    def pairs(self) -> int:
        return self.rows * self.experts

    @property
    def text(self) -> str:
        truths = ", ".join(str(truth).lower() for truth in (self.added, self.own))
        return f"ByExpert<{self.rows}, {self.experts}, {truths}>"


class Translator(Protocol):
    """What `translate` gives for a body's values."""

    body: Graph
    rows: int
    known: dict[Value, Expression]

    def name(self, value: Value) -> str: ...
    def row(self, value: Value, like: Value) -> Expression: ...
    def readable(self, value: Value) -> Expression: ...
    def in_memory(self, value: Value) -> Expression: ...
    def parts_of(self, node: Node) -> int: ...
    def phase(
        self, problem: Problem, x: Expression, weight: str, scales: str, parts: int,
        by: ByExpert | None = None,
    ) -> int: ...  # fmt: skip


def check_gather(node: Node) -> None:
    """Has a product by experts a place in a region?

    Raises:
        Unknown: it has none.
    """
    problem = node.args["problem"]
    if node.stream is not None:
        raise Unknown("it has a stream of its own")
    if node.args["kernel"] != TiledGather.name:
        raise Unknown(f"its kernel is {node.args['kernel']}")
    if problem.dtype not in HALF or problem.k % 8:
        raise Unknown(f"experts of {problem.dtype} and {problem.k} columns")
    if problem.m > MOST_PAIRS:
        raise Unknown(f"{problem.m} rows of experts; up to {MOST_PAIRS} are read by themselves")
    if node.value("lhs_indices") is not None or node.value("rhs_indices") is None:
        raise Unknown("experts of other rows than each of x in turn")


class Experts:
    """Translates what belongs to experts and their routers.

    Attributes:
        pairs: values that have a row of each pair, and by which matrices they came.
    """

    def __init__(self, translator: Translator) -> None:
        self.t = translator
        self.routing = Routing(translator.name)
        self.pairs: dict[Value, ByExpert] = {}

    @property
    def routers(self) -> list[Router]:
        return [router for router in self.routing.routers if router.before >= 0]

    def has(self, node: Node) -> bool:
        if node.op == OP or self.routing.has(node):
            return True
        if node.op == "take":
            return node.operand("indices") in self.routing.known
        return any(v in self.pairs for v in node.inputs)

    def take(self, node: Node) -> None:
        if node.stream is not None:
            raise Unknown("it has a stream of its own")
        if node.op == OP:
            self._product(node)
        elif node.op == "take":
            self._taken(node)
        elif self.routing.has(node):
            source = node.inputs[0]
            leaf = None
            if source not in self.routing.known and source in self.t.known:
                e = self.t.in_memory(source)
                leaf = e if isinstance(e, Leaf) else None
            self.routing.take(node, leaf, self.t.rows)
        elif node.op == "split":
            self._split(node)
        elif node.op == "reshape":
            self.t.known[node.output] = self.t.known[node.inputs[0]]
            self.pairs[node.output] = self.pairs[node.inputs[0]]
        elif node.op == "sum":
            self._sum(node)
        else:
            self._applied(node)

    def check_stored(self, value: Value) -> None:
        """Results that are to be added up are never written."""
        if value in self.pairs and self.pairs[value].added:
            raise Unknown("results of experts that are not only added up")

    # ---- parts

    def _product(self, node: Node) -> None:
        check_gather(node)
        t, problem = self.t, node.args["problem"]
        indices = node.operand("rhs_indices")
        router, chosen = self.routing.indices(indices)
        source = node.operand("x")
        own = source in self.pairs
        x = t.readable(source)
        if own and not (isinstance(x, Leaf) and x.columns == problem.k and not x.offset):
            raise Unknown("rows of pairs that are not as a product gave them")
        added = self._is_added(node)
        by = ByExpert(chosen.name, t.rows, chosen.width, added, own)
        if by.pairs != problem.m:
            raise Unknown(f"{problem.m} rows of {chosen.width} experts of {t.rows} rows")
        weight, scales = (t.name(part) for part in node.args["packed"])
        parts = chosen.width if added else t.parts_of(node)
        phase = t.phase(problem.replace(m=by.pairs, experts=0), x, weight, scales, parts, by)
        if router.before < 0:
            router.before = phase
        if not router.after < router.before <= phase:
            raise Unknown("experts before their router")
        self.pairs[node.output] = by
        if added or parts == 1:
            t.known[node.output] = Part(phase, 0, node.output.dtype)
            return
        (split,) = t.body.users[node.output]
        for i, value in enumerate(split.outputs):
            t.known[value] = Part(phase, i, value.dtype)
            self.pairs[value] = by

    def _is_added(self, node: Node) -> bool:
        """Do its results come to a sum, and not to another product?"""
        seen, stack, sums = set(), list(node.outputs), False
        while stack:
            value = stack.pop()
            for user in self.t.body.users.get(value, ()):
                if user.op == "sum":
                    sums = True
                elif user.op != OP and user not in seen:
                    seen.add(user)
                    stack += user.outputs
                elif user.op == OP:
                    return False
        if not sums:
            raise Unknown("results of experts that are not added up")
        return True

    def _taken(self, node: Node) -> None:
        """A row of each pair of an array of the experts'."""
        array, indices = node.operand("a"), node.operand("indices")
        if setting(node, "axis") != 0 or array.ndim != 2 or array.node.op != "input":
            raise Unknown("what experts have that are no rows of an array")
        if array.dtype not in FLOATS:
            raise Unknown(f"rows of experts of {array.dtype}")
        _, chosen = self.routing.indices(indices)
        name, columns = self.t.name(array), array.shape[-1]
        self.t.known[node.output] = Gathered(name, array.dtype, columns)
        self.pairs[node.output] = ByExpert(chosen.name, self.t.rows, chosen.width, False, False)

    def _split(self, node: Node) -> None:
        if node.outputs[0] not in self.t.known:
            raise Unknown("uneven parts of what experts give")

    def _applied(self, node: Node) -> None:
        if node.op not in OPERATIONS:
            raise Unknown(f"there is no phase for {node.op} of experts")
        t, out = self.t, node.output
        of = [self.pairs[v] for v in node.inputs if v in self.pairs]
        chosen = {by.chosen for by in of}
        if len(chosen) > 1:
            raise Unknown("results of experts of two routers")
        by = next((by for by in of if by.added), of[0])
        args = [self._operand(v, out, by) for v in node.inputs]
        phases = {e.phase for arg in args for e in _parts_of(arg)}
        if len(phases) != 1:
            raise Unknown("results of several products by experts together")
        t.known[out] = Apply(node.op, tuple(args), out.dtype)
        self.pairs[out] = by

    def _operand(self, value: Value, like: Value, by: ByExpert) -> Expression:
        if value in self.pairs:
            if value.shape[-1] != like.shape[-1]:
                raise Unknown(f"{value.type} beside {like.type}")
            return self.t.known[value]
        if value in self.routing.known:
            _, array = self.routing.keep(value)
            if array.width != by.experts or value.shape[-1] != 1 or array.dtype not in FLOATS:
                raise Unknown(f"a router's {value.type} beside {like.type}")
            return array
        if value.ndim == 0:
            return self.t.row(value, like)
        raise Unknown(f"{value.type} beside what experts give")

    def _sum(self, node: Node) -> None:
        value, out = node.inputs[0], node.output
        by, e = self.pairs[value], self.t.known[value]
        axes = setting(node, "axis")
        axes = axes if isinstance(axes, tuple | list) else (axes,)
        axes = {axis % value.ndim for axis in axes if axis is not None}
        length = math.prod(value.shape[axis] for axis in axes)
        before = math.prod(value.shape[: min(axes, default=0)])
        if not by.added or not axes or value.ndim - 1 in axes or length != by.experts:
            raise Unknown("a sum of what experts give that is not of a row's experts")
        if before != by.rows or out.type.size != by.rows * value.shape[-1]:
            raise Unknown("a sum over several rows' experts")
        (phase,) = {part.phase for part in _parts_of(e)}
        self.t.known[out] = Added(phase, 0, out.dtype, e)


def _parts_of(e: Expression) -> list[Part]:
    return [x for x in in_order(e) if isinstance(x, Part)]
