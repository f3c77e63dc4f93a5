"""Recognize the primitives into which MLX expands `fast.rope` on CPUs as the one op again.

Rewrites, exactly on CPUs, within 2e-2 on GPUs, where MLX has a kernel:
    1. rotary embeddings with halves (`traditional=False`) or neighbours (`traditional=True`)
       rotated, of all elements of the last axis or of the first `dims`, for tensors of 3 and more
       axes, scaled positions, and an offset that is a number, a tensor, or one for each of a batch.
    2. frequencies from a base, or a tensor of them.
Leaves alone:
    1. anything that differs from MLX's expansion in one op, setting or constant, such as a model's
       own tables of cosines or rotated tensors multiplied by a factor.
    2. the backward rotation, for which there is no public op.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.importer.expansions import expansion
from qgraph.ir.graph import Graph, Node, Value
from qgraph.types import TensorType

from .shared.raising import Expansion, Raising, layers, number, peel

_LARGEST_LOGARITHM = math.log(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RaiseRope(Raising):
    """See the module."""

    name: str = "raise-rope"

    def find(self, graph: Graph) -> Iterator[Expansion]:
        for node in graph.nodes:
            if node.op == "concatenate":
                found = next((e for e in _guesses(graph, node) if e.holds), None)
                if found is not None:
                    yield _with_known_offset(found)


def _guesses(graph: Graph, node: Node) -> Iterator[Expansion]:
    """What a concatenation of rotated parts may be the end of."""
    rotated = peel(node.inputs[0], "expand_dims")
    if rotated.node.op != "subtract":
        return
    left = rotated.node.inputs[0].node
    if left.op != "multiply" or left.inputs[0].node.op != "getitem":
        return
    angle = peel(left.inputs[1], "broadcast_to", "astype").node
    if angle.op != "cos" or angle.inputs[0].node.op != "multiply":
        return
    positions, frequencies = (peel(v, "broadcast_to") for v in angle.inputs[0].node.inputs)
    settings: dict[str, Any] = {
        "dims": 2 * rotated.shape[-1],
        "traditional": rotated is not node.inputs[0],
    }
    x = left.inputs[0].node.inputs[0]
    for offset, scale in _positions(positions):
        for source, root in itertools.product(
            layers(x, "expand_dims", "reshape"), _ends(graph, node)
        ):
            if root.type == source.type:
                operands = {"a": source, "offset": offset}
                yield from _with_frequencies(
                    Expansion(root, "fast.rope", operands, {**settings, "scale": scale}),
                    frequencies,
                )


def _ends(graph: Graph, node: Node) -> list[Value]:
    """The concatenation and the reshapes and concatenations that alone read it in turn."""
    found = [node.output]
    while len(users := graph.users.get(found[-1], ())) == 1 and len(found) < 4:
        if users[0].op not in ("reshape", "concatenate"):
            break
        found.append(users[0].output)
    return found


def _positions(positions: Value) -> Iterator[tuple[Value, float]]:
    """Offset and scale of the positions of a rotation."""
    product = peel(positions, "expand_dims").node
    if product.op != "multiply" or product.inputs[0].node.op != "add":
        return
    scale, start = number(product.inputs[1]), product.inputs[0].node.inputs[1]
    if scale is not None:
        for offset in layers(peel(start, "broadcast_to"), "astype", "expand_dims"):
            if mx.issubdtype(offset.dtype, mx.integer):
                yield offset, scale


def _with_frequencies(guess: Expansion, frequencies: Value) -> Iterator[Expansion]:
    """The guess with its base, or with the tensor of frequencies."""
    node = frequencies.node
    settings = dict(guess.settings)
    if node.op == "divide":
        operands = {**guess.operands, "freqs": node.inputs[1]}
        yield Expansion(guess.root, guess.op, operands, {**settings, "base": None})
    elif node.op == "exp" and node.inputs[0].node.op == "multiply":
        power = number(node.inputs[0].node.inputs[1])
        if power is not None:
            for base in _bases(power, settings["dims"]):
                yield Expansion(guess.root, guess.op, guess.operands, {**settings, "base": base})


@lru_cache(maxsize=256)
def _bases(power: float, dims: int) -> tuple[float, ...]:
    """The base whose logarithm by half of `dims` is `power` in float32, the roundest of them."""
    if not dims or not abs(power) * (dims // 2) < _LARGEST_LOGARITHM:
        return ()
    about = math.exp(power * (dims // 2))
    round_ones = (float(f"{about:.{digits}g}") for digits in range(1, 9))
    for base in itertools.chain(round_ones, _neighbours(about)):
        near = base > 0 and abs(math.log(base) / (dims // 2) - power) <= 1e-6 * abs(power)
        if near and _power(base, dims) == power:
            return (base,)
    return ()


def _neighbours(about: float) -> Iterator[float]:
    """Numbers of float32 around one, the nearest first."""
    up = down = np.float32(about)
    for _ in range(64):
        up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, np.float32(0))
        yield float(up)
        yield float(down)


def _power(base: float, dims: int) -> float | None:
    """The constant by which MLX's expansion holds a base."""
    types = (("a", TensorType((1, 1, 1, dims), mx.float32)), ("offset", TensorType((), mx.int32)))
    settings = {"dims": dims, "traditional": False, "scale": 1.0, "base": base}
    pattern = expansion("fast.rope", types, tuple(settings.items()))
    exps = [n for n in pattern.nodes if n.op == "exp"] if pattern else []
    return number(exps[0].inputs[0].node.inputs[1]) if exps else None


def _with_known_offset(found: Expansion) -> Expansion:
    """The offset as a number where it is a constant."""
    offset = number(found.operands["offset"])
    if offset is None:
        return found
    operands = {name: v for name, v in found.operands.items() if name != "offset"}
    return Expansion(found.root, found.op, operands, {**found.settings, "offset": offset})
