"""Python's signs for ops of two operands."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self


class Operators:
    """A base of tensors, which say how an op is applied to them."""

    __slots__ = ()

    @abstractmethod
    def _op(self, name: str, *others: Any) -> Self:
        """The op of this and others."""

    @abstractmethod
    def _flipped(self, name: str, other: Any) -> Self:
        """The op of another and this."""

    def __add__(self, other: Any) -> Self:
        return self._op("add", other)

    def __radd__(self, other: Any) -> Self:
        return self._flipped("add", other)

    def __sub__(self, other: Any) -> Self:
        return self._op("subtract", other)

    def __rsub__(self, other: Any) -> Self:
        return self._flipped("subtract", other)

    def __mul__(self, other: Any) -> Self:
        return self._op("multiply", other)

    def __rmul__(self, other: Any) -> Self:
        return self._flipped("multiply", other)

    def __truediv__(self, other: Any) -> Self:
        return self._op("divide", other)

    def __rtruediv__(self, other: Any) -> Self:
        return self._flipped("divide", other)

    def __floordiv__(self, other: Any) -> Self:
        return self._op("floor_divide", other)

    def __rfloordiv__(self, other: Any) -> Self:
        return self._flipped("floor_divide", other)

    def __mod__(self, other: Any) -> Self:
        return self._op("remainder", other)

    def __rmod__(self, other: Any) -> Self:
        return self._flipped("remainder", other)

    def __pow__(self, other: Any) -> Self:
        return self._op("power", other)

    def __rpow__(self, other: Any) -> Self:
        return self._flipped("power", other)

    def __matmul__(self, other: Any) -> Self:
        return self._op("matmul", other)

    def __rmatmul__(self, other: Any) -> Self:
        return self._flipped("matmul", other)

    def __and__(self, other: Any) -> Self:
        return self._op("bitwise_and", other)

    def __rand__(self, other: Any) -> Self:
        return self._flipped("bitwise_and", other)

    def __or__(self, other: Any) -> Self:
        return self._op("bitwise_or", other)

    def __ror__(self, other: Any) -> Self:
        return self._flipped("bitwise_or", other)

    def __xor__(self, other: Any) -> Self:
        return self._op("bitwise_xor", other)

    def __rxor__(self, other: Any) -> Self:
        return self._flipped("bitwise_xor", other)

    def __lshift__(self, other: Any) -> Self:
        return self._op("left_shift", other)

    def __rshift__(self, other: Any) -> Self:
        return self._op("right_shift", other)

    def __lt__(self, other: Any) -> Self:
        return self._op("less", other)

    def __le__(self, other: Any) -> Self:
        return self._op("less_equal", other)

    def __gt__(self, other: Any) -> Self:
        return self._op("greater", other)

    def __ge__(self, other: Any) -> Self:
        return self._op("greater_equal", other)
