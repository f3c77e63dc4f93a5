"""Elementwise operations: chains of them as one pass over memory.

Operations of one shape that run in one phase make a chain.  A value that only its own chain reads
is never written to memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ....ir.graph import Node, Value
from ....ir.ops import setting
from ..arrays import Array, merged
from ..unknown import Unknown
from .refs import DTYPES, FLOATS, fill, h, ref

_COMPARE = {
    name: getattr(h, f"OP_{name.upper()}")
    for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
}
_LOGICAL = {
    "logical_and": h.OP_LOGICAL_AND,
    "logical_or": h.OP_LOGICAL_OR,
    "logical_not": h.OP_LOGICAL_NOT,
    "logical_xor": h.OP_NOT_EQUAL,
}
_TESTS = {
    name: getattr(h, f"OP_{name.upper()}")
    for name in ("isnan", "isinf", "isfinite", "isposinf", "isneginf")
}
_ANY = {
    name: getattr(h, f"OP_{name.upper()}")
    for name in ("add", "subtract", "multiply", "maximum", "minimum", "remainder", "floor_divide",
                 "abs", "negative", "sign", "square", "power")
}  # fmt: skip
_BITS = {
    name: getattr(h, f"OP_{name.upper()}")
    for name in ("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_invert", "left_shift",
                 "right_shift")
}  # fmt: skip
_REAL = {
    name: getattr(h, f"OP_{name.upper()}")
    for name in ("divide", "arctan2", "logaddexp", "reciprocal", "sqrt", "rsqrt", "exp", "expm1",
                 "log", "log2", "log10", "log1p", "sigmoid", "tanh", "erf", "erfinv", "sin", "cos",
                 "tan", "sinh", "cosh", "arcsin", "arccos", "arctan", "arcsinh", "arccosh",
                 "arctanh", "floor", "ceil", "trunc", "round")
}  # fmt: skip
ELEMENTWISE = frozenset(
    {*_COMPARE, *_LOGICAL, *_TESTS, *_ANY, *_BITS, *_REAL, "where", "astype", "clip", "degrees",
     "radians"}
)  # fmt: skip
_OF_BOOLEANS = frozenset({"add", "multiply", "maximum", "minimum"})
_ROUNDINGS = frozenset({"floor", "ceil", "trunc", "round"})

LONGEST = 48
"""Instructions of one chain; longer ones go on in the next phase."""


@dataclass(eq=False)
class Chain:
    """Instructions over one shape in one phase.

    Attributes:
        inputs: arrays, broadcast to the shape.
        instructions: op, dtype, up to three numbers of values and a constant; what a number stands
            for is an input (negative, from -1 on) or the result of an instruction.
        outputs: arrays with the instruction that gives them.
    """

    shape: tuple[int, ...]
    level: int
    inputs: list[Array] = field(default_factory=list)
    instructions: list[tuple[int, mx.Dtype, tuple[int, ...], float]] = field(default_factory=list)
    outputs: list[tuple[Array, int]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    into: Chain | None = None
    """The chain that this one was joined to, its numbers moved by `moved`."""
    moved: tuple[int, int] = (0, 0)
    _known: dict[Any, int] = field(default_factory=dict)

    def read(self, array: Array) -> int:
        """The number of an input."""
        at = array.broadcast(self.shape)
        key = (at.buffer.number, at.offset, at.strides, at.dtype)
        if key not in self._known:
            self.inputs.append(at)
            self._known[key] = -len(self.inputs)
        return self._known[key]

    def constant(self, value: float, dtype: mx.Dtype) -> int:
        return self.add(h.OP_CONST, dtype, (), value)

    def add(self, op: int, dtype: mx.Dtype, operands: tuple[int, ...], value: float = 0) -> int:
        key = (op, dtype, operands, repr(value))
        if key not in self._known:
            self.instructions.append((op, dtype, operands, value))
            self._known[key] = len(self.instructions) - 1
        return self._known[key]

    def join(self, other: Chain) -> None:
        """Take in another chain of the same phase and shape."""
        numbers: dict[int, int] = {}
        for i, array in enumerate(other.inputs):
            numbers[-1 - i] = self.read(array)
        for i, (op, dtype, operands, value) in enumerate(other.instructions):
            numbers[i] = self.add(op, dtype, tuple(numbers[n] for n in operands), value)
        self.outputs += [(array, numbers[n]) for array, n in other.outputs]
        self.nodes += other.nodes
        other.into = self
        other.numbers = numbers

    numbers: dict[int, int] = field(default_factory=dict)
    """Of a joined chain: what its numbers became."""

    def encode(self, place: Callable[[Any], int]) -> Any:
        """The step's arguments; `place` puts bytes into the region's and says where."""
        operands = [*self.inputs, *(array for array, _ in self.outputs)]
        shape, strides = merged(self.shape, [a.strides for a in operands])
        count = len(self.inputs)

        def number(n: int) -> int:
            return -1 - n if n < 0 else count + n

        def operand(i: int) -> Any:
            return fill(h.Operand(at=ref(operands[i])), strides=strides[i])

        def instruction(op: int, dtype: mx.Dtype, numbers: tuple[int, ...], value: float) -> Any:
            a, b, c = (*map(number, numbers), *[0] * (3 - len(numbers)))
            made = h.Instruction(op, DTYPES[dtype], a, b, c, 0)
            if op == h.OP_CONST:
                made.value = _bits(value, dtype)
            elif op == h.OP_IOTA:  # along the one axis
                made.value = 0
            return made

        inputs = (h.Operand * count)(*(operand(i) for i in range(count)))
        code = (h.Instruction * len(self.instructions))(
            *(instruction(*each) for each in self.instructions)
        )
        results = (h.Output * len(self.outputs))(
            *(h.Output(operand(count + i), number(n)) for i, (_, n) in enumerate(self.outputs))
        )
        return fill(
            h.Elementwise(),
            rank=len(shape),
            shape=shape,
            inputs=count,
            instructions=len(self.instructions),
            outputs=len(self.outputs),
            input_at=place(inputs),
            instruction_at=place(code),
            output_at=place(results),
        )


def _bits(value: float, dtype: mx.Dtype) -> int:
    """The 64 bits of a constant: a double of a float dtype, else an integer."""
    if dtype in FLOATS:
        return int(struct.unpack("<q", struct.pack("<d", float(value)))[0])
    number = int(value)
    return number - 2**64 if number >= 2**63 else number


Get = Callable[[Any, mx.Dtype], int]
"""The number in a chain of an argument (a value or a Python number), cast to a dtype."""


def instruct(chain: Chain, node: Node, get: Get) -> int:
    """Add a node to a chain; the number of its result.

    Raises:
        Unknown: the engine has no such operation.
    """
    op, out = node.op, node.output.dtype
    if op == "astype":
        return get(node.inputs[0], out)
    if op == "where":
        picks, x, y = (node.args[name] for name in ("condition", "x", "y"))
        return chain.add(h.OP_WHERE, out, (get(picks, mx.bool_), get(x, out), get(y, out)))
    if op == "clip":
        number = get(node.operand("a"), out)
        for name, code in (("a_min", h.OP_MAXIMUM), ("a_max", h.OP_MINIMUM)):
            if node.args.get(name) is not None:
                number = chain.add(code, out, (number, get(node.args[name], out)))
        return number
    if op in _COMPARE:
        dtype = mx.result_type(*(v.dtype for v in node.inputs))
        return chain.add(_COMPARE[op], dtype, tuple(get(v, dtype) for v in node.inputs))
    if op in _LOGICAL:
        return chain.add(_LOGICAL[op], mx.bool_, tuple(get(v, mx.bool_) for v in node.inputs))
    if op in _TESTS:
        dtype = node.inputs[0].dtype
        return chain.add(_TESTS[op], dtype, (get(node.inputs[0], dtype),))
    if op in _BITS:
        return chain.add(_BITS[op], out, tuple(get(v, out) for v in node.inputs))
    return _arithmetic(chain, node, get)


def _arithmetic(chain: Chain, node: Node, get: Get) -> int:
    op, out = node.op, node.output.dtype
    operands = tuple(get(v, out) for v in node.inputs)
    if out == mx.bool_ and op not in _OF_BOOLEANS:
        raise Unknown(f"{op} of booleans")
    if op in ("degrees", "radians"):
        factor = 180 / math.pi if op == "degrees" else math.pi / 180
        return chain.add(h.OP_MULTIPLY, out, (*operands, chain.constant(factor, out)))
    if op in _ROUNDINGS and out not in FLOATS:
        return operands[0]
    if op == "round" and setting(node, "decimals"):
        scale, back = (chain.constant(10.0 ** (sign * setting(node, "decimals")), out)
                       for sign in (1, -1))  # fmt: skip
        whole = chain.add(h.OP_ROUND, out, (chain.add(h.OP_MULTIPLY, out, (*operands, scale)),))
        return chain.add(h.OP_MULTIPLY, out, (whole, back))
    if op in _REAL and out not in FLOATS:
        raise Unknown(f"{op} of integers")
    return chain.add((_REAL | _ANY)[op], out, operands)


def as_constant(value: Value, dtype: mx.Dtype) -> float:
    """The number that a constant without axes holds, in a dtype."""
    array: mx.array = value.node.args["data"].array
    number = array.astype(dtype).item()
    assert not isinstance(number, complex)
    return number
