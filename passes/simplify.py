"""Remove what has no effect, which `mx.compile` leaves in place.

Rewrites, exactly:
    1. `x * 1` and `x / 1` of real numbers, and `x - 0`.
    2. casts to the dtype that the tensor has.
    3. transposes that move nothing, and two that are one.
    4. reshapes and broadcasts to the same shape, and a reshape, `squeeze` or `expand_dims` of a
       reshape.
    5. `-(-x)`.
    6. `broadcast_to` before an elementwise op or `addmm`, which broadcast by themselves.
Leaves alone:
    1. `x + 0` and `x - -0`, which turn -0 into 0.
    2. casts there and back, which round.
    3. whatever changes shape or dtype on the way, such as `x * 1` that broadcasts.
    4. complex `x * 1` and `x / 1`: an infinity times the 0i of 1 is not a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph.tracing.functions as functions
from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.ops import OPS
from qgraph.rewrite.rewriter import Visit, rewrite
from qgraph.rewrite.rules import ApplyRules, Match, Rule

F = functions.FUNCTIONS
_BROADCASTING = {name for name, op in OPS.items() if op.kind == "elementwise"} | {"where", "addmm"}


def _keeps_type(match: Match) -> str | None:
    x = match["x"].value
    return None if x.type == match.node.output.type else "it changes the type"


def _keeps_value(match: Match) -> str | None:
    if match["x"].dtype == mx.complex64:
        return "complex products with an infinity are not a number"
    return _keeps_type(match)


def _itself(x: Any, **_: Any) -> Any:
    return x


def _axes(axes: Sequence[int] | None, ndim: int) -> list[int]:
    return [a % ndim for a in axes] if axes else list(reversed(range(ndim)))


def _moves_nothing(match: Match) -> str | None:
    ndim = match["x"].ndim
    return None if _axes(match["axes"], ndim) == list(range(ndim)) else "it moves axes"


def _one_transpose(x: Any, first: Any, second: Any) -> Any:
    inner, outer = _axes(first, x.ndim), _axes(second, x.ndim)
    both = [inner[a] for a in outer]
    return x if both == list(range(x.ndim)) else F["transpose"](x, tuple(both))


def _reshaped(x: Any, shape: Any) -> Any:
    made = F["reshape"](x, shape)
    return x if made.shape == x.shape else made


def _effectless(name: str, pattern: Any) -> Rule:
    return Rule(name, pattern, _itself, _keeps_type)


RULES = (
    Rule("times-one", lambda x: x * 1, _itself, _keeps_value),
    Rule("over-one", lambda x: x / 1, _itself, _keeps_value),
    _effectless("minus-zero", lambda x: x - 0),
    _effectless("same-cast", lambda x, dtype: F["astype"](x, dtype)),
    Rule("identity-transpose", lambda x, axes: F["transpose"](x, axes), _itself, _moves_nothing),
    Rule(
        "transpose-of-transpose",
        lambda x, first, second: F["transpose"](F["transpose"](x, first), second),
        _one_transpose,
    ),
    _effectless("same-reshape", lambda x, shape: F["reshape"](x, shape)),
    Rule(
        "reshape-of-reshape",
        lambda x, first, second: F["reshape"](F["reshape"](x, first), second),
        lambda x, first, second: _reshaped(x, second),
    ),
    Rule(
        "squeeze-of-reshape",
        lambda x, shape, axis: F["squeeze"](F["reshape"](x, shape), axis),
        lambda x, shape, axis: _reshaped(x, F["squeeze"](F["reshape"](x, shape), axis).shape),
    ),
    Rule(
        "expand-dims-of-reshape",
        lambda x, shape, axis: F["expand_dims"](F["reshape"](x, shape), axis),
        lambda x, shape, axis: _reshaped(x, F["expand_dims"](F["reshape"](x, shape), axis).shape),
    ),
    _effectless("same-broadcast", lambda x, shape: F["broadcast_to"](x, shape)),
    Rule("negative-of-negative", lambda x: F["negative"](F["negative"](x)), _itself),
)


@dataclass(frozen=True)
class Simplify:
    """See the module."""

    name: str = "simplify"
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        graph = rewrite(graph, _broadcasting, self.name)
        return ApplyRules(RULES, explain=False, name=self.name)(graph)


def _broadcasting(graph: Graph) -> Visit | None:
    return _without_broadcasts if "broadcast_to" in graph.ops else None


def _without_broadcasts(node: Node, _: Node) -> Sequence[Value] | None:
    if node.op not in _BROADCASTING or len(node.outputs) > 1:
        return None
    # By name: of one value that stands in two places, one may need the broadcast.
    names = ["c"] if node.op == "addmm" else [n for n, a in node.args.items() if _is_value(a)]
    args = dict(node.args)
    for name in names:
        given = node.operand(name)
        if given.node.op != "broadcast_to":
            continue
        bare = {**args, name: given.node.operand("a")}
        shapes = [a.shape for a in bare.values() if _is_value(a)]
        # One operand at least gives the shape of the result.
        if node.op == "addmm" or np.broadcast_shapes(*shapes) == node.output.type.shape:
            args = bare
    if all(args[name] is node.args[name] for name in names):
        return None
    return node.replace(args=args).outputs


def _is_value(arg: Any) -> bool:
    return isinstance(arg, Value)
