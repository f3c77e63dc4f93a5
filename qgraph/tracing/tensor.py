"""Symbolic tensors, and `apply`, which makes a node out of a call of an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NoReturn, Self

import mlx.core as mx
import numpy as np

from ..errors import ShapeError, TraceError
from ..ir.graph import StreamLike, Value, constant_value
from ..ir.op import Op
from ..ir.ops import ALIASES, OPS, RANDOM
from ..kernels.streams import as_device
from ..origin import user_frame
from .constants import constant_for, trace_constants, view_of
from .in_place import own_scope, refuse_outer
from .nodes import beside, make_node
from .operators import Operators

_evaluator: Callable[[Tensor], mx.array] | None = None


def set_evaluator(evaluate: Callable[[Tensor], mx.array]) -> None:
    """How `Tensor.eval` compiles and runs an expression; the compiler, which is above, sets it."""
    global _evaluator
    _evaluator = evaluate


_METHODS = frozenset(name for name in dir(mx.array) if name in OPS or name in ALIASES)
_NUMBER = (bool, int, float, complex)


class At:
    """What `x.at[index]` returns, as for `mx.array`: updates that make a new tensor."""

    __slots__ = ("_index", "_tensor")

    def __init__(self, tensor: Tensor, index: Any = None) -> None:
        self._tensor, self._index = Tensor(tensor.value), index  # whatever changes it later

    def __getitem__(self, index: Any) -> At:
        return At(self._tensor, index)

    def __getattr__(self, name: str) -> Any:
        if f"at_{name}" not in OPS:
            raise AttributeError(
                f"x.at[...] has no {name!r}; it has set, add, multiply, maximum, …"
            )
        return lambda updates: apply(f"at_{name}", (self._tensor, self._index, updates))


class Tensor(Operators):
    """A tensor of a graph being built: shape and dtype are known, its elements are not.

    Operators and methods are those of `mx.array`.

    >>> import mlx.core as mx, qgraph as qg
    >>> x = qg.tensor(mx.array([1.0, 2.0]))
    >>> (x * 2 + 1).eval()
    array([3, 5], dtype=float32)
    """

    __slots__ = ("__weakref__", "scope", "value")

    def __init__(self, value: Value) -> None:
        self.value = value
        self.scope = own_scope.get()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.type.shape

    @property
    def dtype(self) -> mx.Dtype:
        return self.value.type.dtype

    @property
    def ndim(self) -> int:
        return self.value.type.ndim

    @property
    def size(self) -> int:
        return self.value.type.size

    @property
    def nbytes(self) -> int:
        return self.value.type.nbytes

    @property
    def itemsize(self) -> int:
        return int(self.dtype.size)

    @property
    def T(self) -> Tensor:
        return self._op("transpose")

    @property
    def mT(self) -> Tensor:
        return self._op("matrix_transpose")

    @property
    def at(self) -> At:
        return At(self)

    @property
    def real(self) -> Tensor:
        return self._op("real")

    @property
    def imag(self) -> Tensor:
        return self._op("imag")

    def _op(self, name: str, *others: Any) -> Self:
        result: Self = apply(name, (self, *others))
        return result

    def _flipped(self, name: str, other: Any) -> Self:
        result: Self = apply(name, (other, self))
        return result

    def __eq__(self, other: object) -> Any:
        return self._op("equal", other) if _comparable(other) else False

    def __ne__(self, other: object) -> Any:
        return self._op("not_equal", other) if _comparable(other) else True

    __hash__ = object.__hash__

    def __neg__(self) -> Tensor:
        return self._op("negative")

    def __pos__(self) -> Tensor:
        return Tensor(self.value)

    def __abs__(self) -> Tensor:
        return self._op("abs")

    def __invert__(self) -> Tensor:
        return self._op("logical_not" if self.dtype == mx.bool_ else "bitwise_invert")

    def __getitem__(self, index: Any) -> Tensor:
        return self._op("getitem", index)

    def __setitem__(self, index: Any, updates: Any) -> None:
        self._become("at_set", index, updates)

    def _become(self, name: str, *others: Any) -> Tensor:
        """Change in place, as an `mx.array` does: all names of this tensor see the new value."""
        refuse_outer(self.scope, self.value)
        self.value = self._op(name, *others).value
        return self

    def __len__(self) -> int:
        if not self.shape:
            raise TraceError("len() of a 0-d tensor", hint="it has no axes; use it as it is")
        return self.shape[0]

    def reshape(self, *shape: Any) -> Tensor:
        whole = len(shape) == 1 and isinstance(shape[0], list | tuple)
        return self._op("reshape", shape[0] if whole else shape)

    def transpose(self, *axes: Any) -> Tensor:
        if not axes:
            return self.T
        return self._op("transpose", axes[0] if isinstance(axes[0], list | tuple) else axes)

    def __getattr__(self, name: str) -> Any:
        if name not in _METHODS:
            raise AttributeError(f"a symbolic tensor has no attribute {name!r}")
        return lambda *args, **kwargs: apply(name, (self, *args), kwargs)

    def eval(self) -> mx.array:
        """Compile and run the expression; its arrays must all be known.

        Raises:
            TraceError: it depends on an argument of a function being traced.
        """
        assert _evaluator is not None
        return _evaluator(self)

    def numpy(self) -> np.ndarray:
        """The value as a NumPy array; bfloat16 comes as float32."""
        array = self.eval()
        return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)

    def _refuse(self, use: str, hint: str) -> NoReturn:
        raise TraceError(
            f"{use} needs the elements of a symbolic tensor {self.value.type}", hint=hint
        )

    def __bool__(self) -> bool:
        self._refuse("a Python condition", "use qg.where, qg.cond or qg.while_loop instead")

    def __iter__(self) -> Iterator[Tensor]:
        self._refuse("iteration", "use qg.scan, qg.unstack(x) or a loop over range(len(x))")

    def __float__(self) -> float:
        self._refuse("float()", "keep it a tensor, or call .eval() on a lazy tensor")

    def __int__(self) -> int:
        self._refuse("int()", "keep it a tensor, or call .eval() on a lazy tensor")

    def __index__(self) -> int:
        self._refuse("a Python index", "use qg.take, qg.slice or qg.slice_update")

    def __format__(self, form: str) -> str:
        if form:
            self._refuse(f"the format {form!r}", "print its elements after the program has run")
        return repr(self)

    def item(self) -> NoReturn:
        self._refuse(".item()", "keep it a tensor, or call .eval().item() on a lazy tensor")

    def tolist(self) -> NoReturn:
        self._refuse(".tolist()", "keep it a tensor, or call .eval().tolist() on a lazy tensor")

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("a NumPy function", "call the function of the same name in qgraph")

    def __mlx_array__(self) -> NoReturn:
        self._refuse(
            "an mlx.core function (or an mx.array to the left of an operator)",
            "call the function of the same name in qgraph, or make the left side qg.tensor(...)",
        )

    def __repr__(self) -> str:
        return f"Tensor({self.value.type})"


def _in_place(name: str) -> Callable[[Tensor, Any], Any]:
    def operator(tensor: Tensor, other: Any) -> Any:
        if pattern_reader.get() is not None:  # patterns have no values: `a += b` is `a = a + b`
            return NotImplemented
        if name == "divide" and not mx.issubdtype(tensor.dtype, mx.inexact):
            raise ShapeError(
                f"/= would change the dtype of {tensor.value.type}", hint="write x = x / y"
            )
        return tensor._become(name, other)

    return operator


for _operator, _op in {
    **dict(add="add", sub="subtract", mul="multiply", truediv="divide", pow="power"),
    **dict(floordiv="floor_divide", mod="remainder", matmul="matmul"),
    **{"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"},
    **dict(lshift="left_shift", rshift="right_shift"),
}.items():
    setattr(Tensor, f"__i{_operator}__", _in_place(_op))


def _comparable(thing: Any) -> bool:
    """Can it be equal to a tensor?  None, strings and lists are not, as for `mx.array`."""
    known = (Tensor, Value, mx.array, np.ndarray, np.generic, *_NUMBER)
    return isinstance(thing, known) or hasattr(thing, "__mlx_array__")


def as_tensor(thing: Any) -> Tensor:
    """`thing` as a tensor; a Python number has the dtype that MLX gives it alone."""
    if isinstance(thing, Tensor):
        return thing
    if isinstance(thing, Value):
        return Tensor(thing)
    if isinstance(thing, _NUMBER):
        return Tensor(constant_value(mx.array(thing), origin=user_frame()))
    return Tensor(value_of(thing if isinstance(thing, mx.array) else mx.array(thing)))


def value_of(array: mx.array) -> Value:
    """An array as a value: a constant, or a node where the traced function took it of another."""
    found = view_of(array)
    if found is None:
        return constant_for(array)
    source, op, args = found
    made: Tensor = apply(op, (Tensor(value_of(source)), *args))
    return made.value


def has_tensor(arg: Any) -> bool:
    """Is there a symbolic tensor anywhere in `arg`?"""
    if isinstance(arg, Tensor):
        return True
    if isinstance(arg, tuple | list):
        return any(has_tensor(item) for item in arg)
    if isinstance(arg, dict):
        return any(has_tensor(item) for item in arg.values())
    return False


def _as_index(index: Any) -> Any:
    """An index in which lists are the arrays that MLX takes them for: `x[[0, 2]]` picks two rows.

    A node keeps lists and tuples alike, and a tuple is an index for each axis.
    """
    if isinstance(index, list):
        if has_tensor(index):
            return apply("stack", (index,))
        try:
            return mx.array(index)
        except (TypeError, ValueError) as error:
            raise ShapeError(
                f"an index holds the list {index}: {error}",
                hint="a list in an index holds integers",
            ) from None
    if isinstance(index, tuple):
        return tuple(_as_index(part) for part in index)
    return index


def _to_arg(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.value
    if isinstance(arg, mx.array):
        return value_of(arg)
    if isinstance(arg, list | tuple):
        return tuple(_to_arg(item) for item in arg)
    if isinstance(arg, np.ndarray):
        return constant_value(mx.array(arg))
    return arg.item() if isinstance(arg, np.generic) else arg


_IN_PLACE_OF_TENSORS = (*_NUMBER, np.ndarray, np.generic)


def _with_constants(op: Op, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments, with constants for numbers and NumPy's arrays in the places of tensors."""
    if not any(isinstance(a, _IN_PLACE_OF_TENSORS) for a in given.values()):
        return given
    tensors = (a for n, a in given.items() if n in op.weak_operands)
    like = next((a.dtype for a in tensors if isinstance(a, Tensor | Value | mx.array)), None)

    def constant(name: str, arg: Any) -> Any:
        weak = name in op.weak_operands
        number = name in op.scalar_operands and isinstance(arg, _NUMBER)
        if not number and not (weak and isinstance(arg, np.ndarray | np.generic)):
            return arg
        if isinstance(arg, int) and not -(2**63) <= arg < 2**63:
            raise ValueError(f"{arg} has more than 64 bits")
        return constant_value(mx.array(arg) if like is None or not weak else beside(arg, like))

    return {name: constant(name, arg) for name, arg in given.items()}


PatternReader = Callable[[Op, tuple[Any, ...], Mapping[str, Any]], Any]
pattern_reader: ContextVar[PatternReader | None] = ContextVar("pattern_reader", default=None)
"""While a rule's pattern is read, calls of ops are noted by this instead of making nodes."""


def apply(
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    stream: StreamLike = None,
) -> Any:
    """Call op `name`: as a new node inside a trace or on tensors, at once on arrays alone.

    Raises:
        ShapeError: the arguments do not fit the op, with the user's line.
    """
    op = OPS[ALIASES.get(name, name)]
    kwargs = kwargs or {}
    if (note := pattern_reader.get()) is not None:
        return note(op, args, kwargs)
    if isinstance(stream, str) and stream not in ("cpu", "gpu"):
        raise ShapeError(f"{name}: no stream {stream!r}", hint='give "cpu", "gpu" or an mx.Stream')
    if "index" in op.signature.parameters and len(args) > 1:
        args = (args[0], _as_index(args[1]), *args[2:])
    if trace_constants.get() is None and not has_tensor(args) and not has_tensor(dict(kwargs)):
        plain = stream is None or op.kind in ("local", "placement")
        on = {} if plain else {"stream": as_device(stream)}
        return op.fn(*args, **kwargs, **on)
    try:
        given = op.bind(args, kwargs)
    except TypeError as error:
        raise ShapeError(f"{name}: {error}", hint=f"its parameters are {op}") from None
    if op.name in RANDOM and given.get("key") is None:
        raise TraceError(
            f"{name} without a key would give the same numbers at every call",
            hint="pass key=, such as an argument of the traced function",
        )
    parameters = op.signature.parameters
    given = {n: a for n, a in given.items() if a is not parameters[n].default}
    try:
        converted = {n: _to_arg(a) for n, a in _with_constants(op, given).items()}
    except (TypeError, ValueError) as error:
        words = str(error).splitlines()[0]
        raise ShapeError(f"{name}: {words}", hint=f"its parameters are {op}") from None
    node, several = make_node(op.name, converted, stream=stream)
    outputs = [Tensor(value) for value in node.outputs]
    return outputs[0] if several is None else several(outputs)
