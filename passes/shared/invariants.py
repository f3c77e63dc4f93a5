"""Operands of loops and branches that no turn changes, as the invariants that they are.

    fori_loop(0, n, lambda i, c: (f(c[0], c[1]), c[1]), (x, w))

carries w, and hands it on as it came; in `cond(p, f, g, x, w)` nothing changes at all.  As
invariants they tell `hoist-quantize` that what is computed from them may leave.
"""

from __future__ import annotations

from collections.abc import Sequence

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.loops import CONTROL_FLOW, bodies, invariant_names, unchanging
from qgraph.rewrite.rewriter import rewrite_each


def as_invariants(graph: Graph, made_by: str) -> Graph:
    """The graph with unchanging operands as invariants, inner loops first; exact.

    >>> import qgraph as qg
    >>> def turn(i, carry):
    ...     h, w = carry
    ...     return h @ w, w
    >>> loop = lambda x, w: qg.fori_loop(0, 4, turn, (x, w))[0]
    >>> graph = qg.trace(loop, qg.spec((2, 2)), qg.spec((2, 2)))
    >>> node = as_invariants(graph, "").nodes[-1]
    >>> len(node.args["carried"]), len(node.args["invariants"])
    (1, 1)
    """
    return rewrite_each(graph, _visit, made_by, CONTROL_FLOW)


def _visit(node: Node) -> Sequence[Value] | None:
    fixed = unchanging(node)
    if not fixed:
        return None
    carried: tuple[Value, ...] = node.args["carried"]
    if len(fixed) == len(node.outputs) and node.op != "cond":
        return carried
    new = _without(node, fixed)
    if node.op == "cond":
        return new.outputs
    rest = iter(new.outputs)
    return [carried[i] if i in fixed else next(rest) for i in range(len(node.outputs))]


def _without(node: Node, fixed: set[int]) -> Node:
    """`node` with the operands at `fixed` as invariants."""
    carried = node.args["carried"]
    outer = tuple(v for i, v in enumerate(carried) if i in fixed)
    args = {**node.args, "carried": tuple(v for i, v in enumerate(carried) if i not in fixed)}
    graphs = []
    for body, name in zip(bodies(node), invariant_names(node), strict=True):
        own = [v for i, v in enumerate(body.carried) if i in fixed]
        rest = [v for v in body.graph.inputs if v not in own]
        graphs.append(body.graph.replace(inputs=[*rest, *own]))
        args[name] = (*node.args[name], *outer)
    types = [v.type for v in node.outputs]
    if node.op != "cond":
        outputs = [v for i, v in enumerate(graphs[-1].outputs) if i not in fixed]
        graphs[-1] = graphs[-1].replace(outputs=outputs)
        types = [t for i, t in enumerate(types) if i not in fixed]
    return node.replace(args=args, bodies=tuple(graphs), types=types)
