"""What an error at each output of each product costs at the end: one backward pass a batch.

The measure is the Fisher information of the graph's result: for logits, gradients of the
log-likelihood of tokens drawn from the model itself, whose second moments are the curvature of the
Kullback-Leibler divergence from it; for other results, those of random signs times the result,
whose second moments are the curvature of half the squared error.  Tokens and outputs are taken as
independent: an error e costs half of the sum of g² e².

The forward pass keeps what lives at cuts between layers; each layer is run again before its
gradients are taken, so that memory holds one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ...ir.graph import Graph, Node, Value
from ...ir.ops import setting
from ...runtime.interpret import Env
from ..weights import PRODUCTS
from .attention import gradients
from .walk import Handle, Use, Walk, attends, live_ranges

Heard = Callable[[Use, mx.array], None]
"""Called with a use of a weight and the gradient at its result."""


def backward(
    walk: Walk, batch: Sequence[mx.array], seed: Callable[[mx.array], mx.array], heard: Heard
) -> None:
    """One forward and one backward pass over a batch.

    Args:
        seed: the gradient at a result of the graph.
        heard: see `Heard`.
    """
    graph = walk.found.graph
    last = live_ranges(graph)
    cuts = _cuts(graph, last)
    env = walk.start(batch)
    kept: list[Env] = []
    for start, stop in cuts:
        kept.append(dict(env))
        for i in range(start, stop):
            walk.run(graph.nodes[i], env)
            for value in graph.nodes[i].inputs:
                if last[value] <= i and not isinstance(env.get(value), Handle):
                    env.pop(value, None)
    at: dict[Value, mx.array] = {}
    for value in graph.outputs:
        if mx.issubdtype(value.dtype, mx.floating):
            at[value] = seed(env[value])
    active = _active(graph)
    for (start, stop), inside in zip(reversed(cuts), reversed(kept), strict=True):
        nodes = graph.nodes[start:stop]
        for node in nodes:
            walk.run(node, inside)
        for node in reversed(nodes):
            _back(walk, node, inside, at, active, heard)
            mx.eval(list(at.values()))
        kept.pop()


def _back(
    walk: Walk, node: Node, env: Env, at: dict[Value, mx.array], active: set[Value], heard: Heard
) -> None:
    """Hand the gradients at the results of a node on to its operands."""
    given = [at.pop(v, None) for v in node.outputs]
    if all(g is None for g in given) or node.op == "constant":
        return
    handles = [env[v] for v in node.inputs if isinstance(env[v], Handle)]
    if handles and not node.bodies:
        (gradient,) = given
        assert gradient is not None
        use = walk.use(node, env)
        if use is not None:
            heard(use, gradient)
        x = node.operand("x") if node.op in PRODUCTS else None
        if node.op == "quantized_matmul" and x in active:
            at_x = walk.multiply(gradient, handles[0], not setting(node, "transpose"))
            _add(at, x, at_x)
            return
    wanted = [v for v in dict.fromkeys(node.inputs) if v in active and v not in handles]
    wanted = [v for v in wanted if isinstance(env[v], mx.array)]
    if not wanted or node.op == "dequantize":
        return
    of = _of_attention if walk.host and attends(node) else _of_any
    for value, gradient in of(walk, node, env, given, wanted, heard):
        _add(at, value, gradient)


Found = Iterable[tuple[Value, mx.array]]


def _of_attention(
    walk: Walk, node: Node, env: Env, given: list[Any], wanted: list[Value], heard: Heard
) -> Found:
    q, k, v = (node.operand(name) for name in ("q", "k", "v"))
    added = node.value("mask")
    mask = node.args.get("mask") if added is None else env[added]
    arrays = gradients(env[q], env[k], env[v], node.args["scale"], mask, given[0])
    return zip((q, k, v), arrays, strict=True)


def _of_any(
    walk: Walk, node: Node, env: Env, given: list[Any], wanted: list[Value], heard: Heard
) -> Found:
    """By MLX, through the node as it is carried out."""
    places = [i for i, g in enumerate(given) if g is not None]
    up = [given[i] for i in places]
    arrays = [env[v] for v in wanted]

    def again(*arrays: mx.array, walk: Walk = walk) -> list[mx.array]:
        inner = {**env, **dict(zip(wanted, arrays, strict=True))}
        walk.interpreter.run(node, inner)
        return [inner[node.outputs[i]] for i in places]

    if not node.bodies:
        return zip(wanted, mx.vjp(again, arrays, up)[1], strict=True)
    found, uses = _probed(walk, again, arrays, up)
    for use, gradient in uses:
        heard(use, gradient)
    return zip(wanted, found, strict=True)


def _probed(
    walk: Walk, again: Callable[..., list[mx.array]], arrays: list[mx.array], given: list[Any]
) -> tuple[list[mx.array], list[tuple[Use, mx.array]]]:
    """Through loops: zeros are added to each result of a weight, whose gradients are taken.

    Returns:
        The gradients at `arrays`, and those at each use of a weight.
    """
    uses: list[Use] = []
    zeros: list[mx.array] = []

    def collect(node: Node, env: Env, result: mx.array) -> mx.array:
        use = walk.use(node, env)
        assert use is not None
        uses.append(use)
        zeros.append(mx.zeros_like(result))
        return result

    # In NumPy nothing has gradients.
    probing = replace(walk, listener=None, host=False, probe=collect)
    mx.eval(again(*arrays, walk=probing))

    def with_probes(*everything: mx.array) -> list[mx.array]:
        rest = iter(everything[len(arrays) :])
        probing.probe = lambda node, env, result: result + next(rest)
        return again(*everything[: len(arrays)], walk=probing)

    _, found = mx.vjp(with_probes, [*arrays, *zeros], given)
    return found[: len(arrays)], list(zip(uses, found[len(arrays) :], strict=True))


def _add(at: dict[Value, mx.array], value: Value, gradient: mx.array) -> None:
    before = at.get(value)
    at[value] = gradient if before is None else before + gradient


def _active(graph: Graph) -> set[Value]:
    """Float values that depend on a weight or an input: gradients go through them."""
    found = {v for v in graph.inputs if mx.issubdtype(v.dtype, mx.floating)}
    for node in graph.nodes:
        starts = node.op == "dequantize"
        if node.op not in ("constant", "quantize") and (
            starts or not found.isdisjoint(node.inputs)
        ):
            found.update(v for v in node.outputs if mx.issubdtype(v.dtype, mx.floating))
    return found


def _cuts(graph: Graph, last: dict[Value, int]) -> list[tuple[int, int]]:
    """Stretches of nodes between places where little lives, constants aside."""
    alive = 0
    sizes: dict[int, int] = {}
    ends: dict[int, int] = {}
    for i, node in enumerate(graph.nodes):
        if node.op in ("constant", "quantize"):
            continue
        for value in node.outputs:
            size = value.type.size
            alive += size
            end = last.get(value, i)
            ends[end] = ends.get(end, 0) + size
        alive -= ends.get(i, 0)
        sizes[i] = alive
    steps = list(sizes)
    middle = steps[len(steps) // 4 : -max(1, len(steps) // 8)] or steps
    narrow = 1.25 * min((sizes[i] for i in middle if sizes[i]), default=0)
    places = [0]
    places += [i for before, i in pairwise(steps) if 0 < sizes[before] <= narrow < sizes[i]]
    places.append(len(graph.nodes))
    return [(a, b) for a, b in pairwise(places) if a < b]


def of_logits(seed: int = 0) -> Callable[[mx.array], mx.array]:
    """Gradients of minus the log-likelihood of tokens drawn from the logits, (..., classes)."""
    key = mx.random.key(seed)

    def at(logits: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        drawn = mx.random.categorical(logits.astype(mx.float32), key=now)
        p = mx.softmax(logits.astype(mx.float32), axis=-1)
        classes = mx.arange(logits.shape[-1])
        return (p - (drawn[..., None] == classes)).astype(logits.dtype)

    return at


def of_values(seed: int = 0) -> Callable[[mx.array], mx.array]:
    """Random signs."""
    random = np.random.default_rng(seed)

    def at(result: mx.array) -> mx.array:
        signs = random.integers(0, 2, result.shape) * 2.0 - 1
        return mx.array(signs.astype(np.float32)).astype(result.dtype)

    return at
