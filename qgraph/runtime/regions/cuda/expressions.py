"""What a number of a region is computed from, and how that is written in CUDA.

An expression is a row of columns: the same is done to each of them, but for a norm, which needs all
of its argument's.  Numbers are float32, rounded to the dtype of each operation as MLX rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import mlx.core as mx
import numpy as np

TYPES = {
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.float32: "float",
    mx.uint64: "uint64_t",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.uint8: "uint8_t",
}
"""As MLX writes them in a kernel's arguments."""

FLOATS = (mx.bfloat16, mx.float16, mx.float32)


@dataclass(frozen=True, eq=False)
class Leaf:
    """An array in memory, or some columns of it.

    Attributes:
        name: in the source.
        columns: of a row of the array, 0 if all rows are the same one.
        offset: the first column.
        after: the phase that writes it, -1 if it is there before.
    """

    name: str
    dtype: mx.Dtype
    columns: int
    offset: int = 0
    after: int = -1


@dataclass(frozen=True, eq=False)
class Summed(Leaf):
    """The sum over a mesh of what every rank has put into the memory that all can reach.

    Attributes:
        at: bytes of a rank's addends that lie before this sum's.
        nbytes: of a rank's addend.
    """

    at: int = 0
    nbytes: int = 0


@dataclass(frozen=True, eq=False)
class Gathered(Leaf):
    """The row of an array that a row's expert has, such as its bias."""


@dataclass(frozen=True, eq=False)
class Routed:
    """Numbers of each row in a block's shared memory, of a router: one, or one for each expert."""

    name: str
    dtype: mx.Dtype
    width: int


@dataclass(frozen=True, eq=False)
class Number:
    value: float


@dataclass(frozen=True, eq=False)
class Part:
    """What the product of a phase gives: of its PARTS columns that end up together, one."""

    phase: int
    part: int
    dtype: mx.Dtype


@dataclass(frozen=True, eq=False)
class Added(Part):
    """The sum of what a row's experts give; `of` is written for one of them."""

    of: Expression


@dataclass(frozen=True, eq=False)
class Apply:
    """An elementwise operation."""

    op: str
    args: tuple[Expression, ...]
    dtype: mx.Dtype


@dataclass(frozen=True, eq=False)
class Normed:
    """Its argument times 1 / sqrt(the mean of its squares + eps), in `dtype`."""

    arg: Expression
    eps: float
    dtype: mx.Dtype


Expression: TypeAlias = Leaf | Routed | Number | Part | Apply | Normed

OPERATIONS: Mapping[str, str] = {
    "add": "{0} + {1}",
    "subtract": "{0} - {1}",
    "multiply": "{0} * {1}",
    "divide": "{0} / {1}",
    "maximum": "greater({0}, {1})",
    "minimum": "-greater(-({0}), -({1}))",
    "negative": "-{0}",
    "abs": "fabsf({0})",
    "square": "{0} * {0}",
    "sqrt": "sqrtf({0})",
    "rsqrt": "1.0f / sqrtf({0})",
    "reciprocal": "1.0f / {0}",
    "exp": "expf({0})",
    "log": "logf({0})",
    "sigmoid": "1.0f / (1.0f + expf(-{0}))",
    "tanh": "tanhf({0})",
    "erf": "erff({0})",
    "power": "powf({0}, {1})",
    "astype": "{0}",
}
"""Elementwise operations of floats, each rounded to its dtype afterwards."""


def arguments(e: Expression) -> tuple[Expression, ...]:
    if isinstance(e, Apply):
        return e.args
    return (e.arg,) if isinstance(e, Normed) else ()


def in_order(*roots: Expression) -> list[Expression]:
    """All that expressions are made of, each once, arguments first."""
    found: dict[Expression, None] = {}
    stack: list[tuple[Expression, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        e, ready = stack.pop()
        if e in found:
            continue
        if ready:
            found[e] = None
        else:
            stack.append((e, True))
            stack += [(arg, False) for arg in reversed(arguments(e))]
    return list(found)


def phase_of(e: Expression) -> int:
    """The phase whose product an expression takes before it is written, -1 if it takes none."""
    return max((x.phase for x in in_order(e) if isinstance(x, Part)), default=-1)


def is_rowwise(e: Expression) -> bool:
    """Does it need a whole row: is there a norm in it?"""
    return any(isinstance(x, Normed) for x in in_order(e))


def after(e: Expression) -> int:
    """The last phase that writes something which an expression reads from memory."""
    return max((x.after for x in in_order(e) if isinstance(x, Leaf)), default=-1)


def literal(value: float) -> str:
    """A float32 in CUDA, exactly.

    >>> literal(0.1), literal(float("-inf"))
    ('0x1.99999ap-4f', '-INFINITY')
    """
    exact: float = np.float32(value).item()
    if exact != exact:
        return "NAN"
    if exact in (float("inf"), float("-inf")):
        return "INFINITY" if exact > 0 else "-INFINITY"
    mantissa, exponent = exact.hex().split("p")
    head, _, digits = mantissa.partition(".")
    return f"{head}.{digits.rstrip('0') or '0'}p{int(exponent)}f"


@dataclass
class Text:
    """Writes expressions as statements of one element each.

    Attributes:
        leaf: how an element of a leaf, or of a product, is written here.
        norms: how the element of a norm's argument, and the factor of its row, are written.
        lines: the statements so far.
    """

    leaf: Callable[[Leaf | Routed | Part], str]
    norms: Mapping[Normed, tuple[str, str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    names: dict[Expression, str] = field(default_factory=dict)

    def write(self, root: Expression) -> str:
        """The name of an expression's element."""
        stop = set(self.norms)
        for e in in_order(root):
            if e in self.names or self._only_inside(e, root, stop):
                continue
            self.names[e] = self._written(e)
        return self.names[root]

    def _only_inside(self, e: Expression, root: Expression, stop: set[Normed]) -> bool:
        """Is it part of nothing but arguments of norms, which are known already?"""
        return bool(stop) and e not in _reached(root, stop)

    def _written(self, e: Expression) -> str:
        if isinstance(e, Number):
            return literal(e.value)
        if isinstance(e, Leaf | Routed | Part):
            text = self.leaf(e)
        elif isinstance(e, Normed):
            element, factor = self.norms[e]
            text = f"rounded<{TYPES[e.dtype]}>({element} * {factor})"
        else:
            args = [f"({n})" if n.startswith("-") else n for n in (self.names[a] for a in e.args)]
            text = f"rounded<{TYPES[e.dtype]}>({OPERATIONS[e.op].format(*args)})"
        name = f"v{len(self.names)}"
        self.lines.append(f"const float {name} = {text};")
        return name


def _reached(root: Expression, stop: set[Normed]) -> set[Expression]:
    """What is computed for an expression where some norms' arguments are known."""
    found: set[Expression] = set()
    stack = [root]
    while stack:
        e = stack.pop()
        if e not in found:
            found.add(e)
            if not (isinstance(e, Normed) and e in stop):
                stack += arguments(e)
    return found
