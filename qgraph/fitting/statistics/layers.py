"""Running a graph on all batches, one node after the other.

Only what later nodes read is kept, so that memory holds the activations of one layer; the weights
behind a product can be fitted when it is reached, on inputs that come from fitted weights
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ...ir.graph import Node
from ...runtime.interpret import Env
from .walk import Handle, Walk, live_ranges


def run_layers(
    walk: Walk,
    batches: Sequence[Sequence[mx.array]],
    before: Callable[[Node, list[Env]], None],
    until: Node | None = None,
) -> None:
    """Carry a graph out on all batches, node by node.

    Args:
        batches: the inputs of each.
        before: called with each node and the environments of the batches before it is run.
        until: the last node to call `before` for; it is not run.
    """
    graph = walk.found.graph
    last = live_ranges(graph)
    envs = [walk.start(batch) for batch in batches]
    for i, node in enumerate(graph.nodes):
        before(node, envs)
        if node is until:
            return
        for env in envs:
            walk.run(node, env)
            for value in {*node.inputs, *node.outputs}:
                if last.get(value, -1) <= i and not isinstance(env.get(value), Handle):
                    env.pop(value, None)
