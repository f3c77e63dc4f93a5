"""The weights of a model of which each rank has packed its part: let go, one by one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import MeshError
from ..ir.graph import Value
from ..tracing.constants import Constants
from .source import Source


class LettingGo:
    """What was let go of a model.

    The model's arrays stay the objects they are, by which its programs know them; what stands in
    them is NaN without memory of its own.  A program to come may need a weight again, in another
    form: it is read from the model's files where `qg.lm.load` read them, else the part is kept.
    """

    def __init__(self, source: Source | None) -> None:
        self._source = source
        self._gone: dict[int, mx.array] = {}

    def __bool__(self) -> bool:
        return bool(self._gone)

    def let_go(self, constant: Value, in_parts: bool, constants: Constants) -> None:
        """Let go what a constant of a program is, if that is an array of the model.

        Args:
            in_parts: was nothing taken of it but parts, which are kept?
        """
        data = constant.node.args["data"]
        found = [a for a, known in constants.values.values() if known.node.args["data"] is data]
        for array in found:
            if data.again is None and self._source is not None:
                data.again = self._source.reader(array)
            if data.again is None and not in_parts:
                return
            data.release()
            if id(array) not in self._gone:
                self._gone[id(array)] = array
                number = float("nan") if mx.issubdtype(array.dtype, mx.floating) else 0
                array[...] = mx.array(number, array.dtype)

    def check(self, model: Any) -> None:
        """Before programs are made of other weights than before.

        Raises:
            MeshError: some of the weights were let go.
        """
        weights: Any = tree_flatten(model.parameters())
        for name, array in weights:
            if id(array) in self._gone:
                raise MeshError(
                    f"weights changed, but {name} was let go: each rank holds its part alone",
                    hint="change weights before the model is first called, or load it again",
                )
