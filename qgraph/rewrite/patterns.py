"""Patterns of rules: a function in the DSL read as a tree of ops, and matched against nodes.

Every parameter of the function is a variable.  It stands for whatever is found in its place: a
tensor, or something static such as an axis or a dtype.  A variable used twice must be the same
both times.  A number in the place of a tensor matches a constant of one element with that value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import TraceError
from ..ir.graph import Node, Value, is_scalar
from ..ir.op import Op
from ..ir.ops import setting
from ..tracing.nodes import beside
from ..tracing.tensor import Tensor, pattern_reader

COMMUTATIVE = frozenset({"add", "multiply", "maximum", "minimum", "equal", "logical_or"})
"""Ops of `a` and `b` that match with their operands either way round."""


class Variable(Tensor):
    """A parameter of a pattern."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


class Call(Tensor):
    """An op of a pattern over variables, other calls, and literals."""

    __slots__ = ("args", "op")

    def __init__(self, op: str, args: Mapping[str, Any]) -> None:
        self.op, self.args = op, args

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(repr, self.args.values()))})"


def read_pattern(fn: Callable[..., Any]) -> tuple[Call, tuple[str, ...]]:
    """The tree of ops that `fn` builds, and the names of its variables.

    Raises:
        TraceError: it gives something other than the one result of an op.

    >>> import qgraph as qg
    >>> read_pattern(lambda x, a: qg.exp(x) * a)
    (multiply(exp(x), a), ('x', 'a'))
    """
    names = tuple(inspect.signature(fn).parameters)

    def note(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        return Call(op.name, op.signature.bind(*args, **kwargs).arguments)

    token = pattern_reader.set(note)
    try:
        tree = fn(*map(Variable, names))
    finally:
        pattern_reader.reset(token)
    if not isinstance(tree, Call):
        raise TraceError(
            f"a pattern gives the result of an op, not {tree!r}",
            hint="write what the rule looks for, such as lambda x: qg.exp(x) * 2",
        )
    return tree, names


@dataclass
class Attempt:
    """How far a pattern got at one node.

    Attributes:
        ops: calls of the pattern that found their op.
        why: what stopped it.
    """

    ops: int = 0
    why: str = ""
    _now: int = field(default=0, repr=False)

    def reached(self) -> None:
        self._now += 1

    def stopped(self, why: str) -> None:
        if self._now > self.ops:
            self.ops, self.why = self._now, why


Bindings = dict[str, Any]


def match_node(tree: Call, node: Node, attempt: Attempt) -> Iterator[Bindings]:
    """Every way in which the pattern fits `node`, with what each variable stands for."""
    return _match_call(tree, node, {}, attempt)


def _match_call(tree: Call, node: Node, found: Bindings, attempt: Attempt) -> Iterator[Bindings]:
    if node.op != tree.op or len(node.outputs) != 1:
        attempt.stopped(f"{node.op} stands where the pattern has {tree.op}")
        return
    attempt.reached()
    places = list(tree.args.items())
    yield from _match_all(places, node, {}, found, attempt)
    if node.op in COMMUTATIVE:
        yield from _match_all(places, node, {"a": "b", "b": "a"}, found, attempt)
    attempt._now -= 1


def _match_all(
    places: list[tuple[str, Any]],
    node: Node,
    swapped: Mapping[str, str],
    found: Bindings,
    attempt: Attempt,
) -> Iterator[Bindings]:
    if not places:
        yield found
        return
    (name, wanted), *rest = places
    for bound in _match_arg(wanted, setting(node, swapped.get(name, name)), found, attempt):
        yield from _match_all(rest, node, swapped, bound, attempt)


def _match_arg(wanted: Any, arg: Any, found: Bindings, attempt: Attempt) -> Iterator[Bindings]:
    if isinstance(wanted, Variable):
        if wanted.name not in found:
            yield {**found, wanted.name: arg}
        elif _same(found[wanted.name], arg):
            yield found
        else:
            attempt.stopped(f"{wanted.name} is not the same in both places")
    elif isinstance(wanted, Call):
        if isinstance(arg, Value):
            yield from _match_call(wanted, arg.node, found, attempt)
    elif isinstance(wanted, tuple | list) and isinstance(arg, tuple):
        if len(wanted) == len(arg):
            yield from _match_items(list(zip(wanted, arg, strict=True)), found, attempt)
    elif _is_literal(wanted, arg):
        yield found
    else:
        attempt.stopped(f"the pattern wants {wanted!r} there")


def _match_items(
    pairs: list[tuple[Any, Any]], found: Bindings, attempt: Attempt
) -> Iterator[Bindings]:
    if not pairs:
        yield found
        return
    for bound in _match_arg(*pairs[0], found, attempt):
        yield from _match_items(pairs[1:], bound, attempt)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Value) and isinstance(b, Value):
        numbers = [_number(v) for v in (a, b)]
        return a.type == b.type and None not in numbers and numbers[0] == numbers[1]
    return not isinstance(a, Value) and not isinstance(b, Value) and bool(a == b)


def _is_literal(wanted: Any, arg: Any) -> bool:
    if isinstance(arg, Value):
        return isinstance(wanted, int | float | complex) and _stands_for(wanted, arg)
    if isinstance(wanted, float) and isinstance(arg, float):  # MLX keeps settings in float32
        return bool(np.float32(wanted) == np.float32(arg))
    return type(wanted) is type(arg) and bool(wanted == arg)


def _stands_for(wanted: complex, value: Value) -> bool:
    """Is the constant what MLX makes of `wanted` beside a tensor of its dtype?

    0.1 is another number in float16, float32 and bfloat16.
    """
    number = _number(value)
    if number is None:
        return False
    try:
        made = beside(wanted, value.dtype)
    except ValueError:  # an integer that the dtype does not hold
        return False
    return made.dtype == value.dtype and repr(made.item()) == repr(number)  # 0 is not -0


def _number(value: Value) -> Any:
    """The number that a constant without axes holds; None for all else."""
    if not is_scalar(value) or value.node.args["data"].is_released:
        return None
    return value.node.args["data"].array.item()
