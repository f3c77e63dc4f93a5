"""What is known of each matrix: what errors at its outputs cost, and the Hessian of its inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...ir.graph import Node
from ...kernels.progress import progress as said
from ..rounding.formats import as_numpy
from ..weights import Prepared, Weight
from .backward import backward, of_logits, of_values
from .moments import Moments
from .rows import Index, of_each_matrix
from .walk import Use, Walk

Array = np.ndarray[Any, Any]
Key = tuple[str, Index]
"""A weight's name, and which matrix of a stack it is."""
Hessian = Callable[[Key], Array]
"""The Hessian of the rows that went into a matrix, (columns, columns), float64."""

_PRIOR = 16
"""A matrix of a stack counts as many rows of the mean of all beside its own."""


@dataclass
class Seen:
    """What backward passes told of one matrix.

    Attributes:
        outputs: sums of squares of the gradients at its outputs; `count` rows.
        columns: those at rows that were looked up; `looked` rows.
        tokens: what each row of input weighs, by reader and batch.
    """

    outputs: Any = 0.0
    columns: Any = 0.0
    count: int = 0
    looked: int = 0
    tokens: dict[tuple[int, int], Array] = field(default_factory=dict)

    def gains(self, rows: int) -> Array:
        """What an error in each of its rows costs."""
        if self.count:
            gains: Array = self.outputs / self.count
            return gains
        return np.full(rows, 1 / rows) if self.looked else np.ones(rows)


class Statistics:
    """Gathered batch by batch, by weight and matrix.

    Args:
        full: gather whole Hessians, not their diagonals alone.
    """

    def __init__(self, found: Prepared, *, full: bool) -> None:
        self.found, self.full = found, full
        self.seen: dict[Key, Seen] = defaultdict(Seen)
        self.moments: dict[Key, Moments] = {}

    def listen(self, batches: Sequence[Sequence[mx.array]], result: str) -> None:
        """One backward pass over each batch.

        Args:
            result: "logits" or "values", as for `Quantize.fit`.
        """
        seed = of_logits() if result == "logits" else of_values()
        with said("gradients", len(batches)) as step:
            for number, batch in enumerate(batches):
                backward(Walk(self.found), batch, seed, partial(self._heard, number))
                step()
        for seen in self.seen.values():
            every = np.concatenate(list(seen.tokens.values())) if seen.tokens else np.ones(1)
            mean = float(every.mean()) or 1.0
            # A token weighs at least a tenth of the mean: some may not have been heard enough.
            seen.tokens = {k: np.maximum(v / mean, 0.1) for k, v in seen.tokens.items()}

    def _heard(self, number: int, use: Use, gradient: mx.array) -> None:
        name = use.handle.name
        for index, x, y in of_each_matrix(use, gradient):
            seen = self.seen[name, index]
            squares = y**2 if y is not None else np.zeros((0, 1))
            if x is None:
                seen.columns = seen.columns + squares.sum(0)
                seen.looked += len(squares)
                continue
            seen.outputs = seen.outputs + squares.sum(0)
            seen.count += len(squares)
            seen.tokens[self._reader(name, use.node), number] = squares.sum(1)

    def _reader(self, name: str, node: Node) -> int:
        """The number of a reader of a weight, which is the same in a graph with scaled weights."""
        return self.found.weights[name].uses.index(node)

    def on(self, found: Prepared) -> None:
        """Go on with a graph of the same nodes in which some weights were scaled."""
        self.found = found

    def take_in(self, use: Use, number: int | None = None) -> None:
        """Keep the moments of what goes into a weight that is fitted later.

        Args:
            number: of the batch, if the rows are to be weighed as its tokens are.
        """
        for key, x, tokens in self._rows(use, number):
            if key not in self.moments:
                self.moments[key] = Moments(x.shape[-1], full=self.full)
            self.moments[key].add(x, tokens)

    def _rows(self, use: Use, number: int | None) -> Iterator[tuple[Key, Array, Array | None]]:
        """Rows that go into each matrix, and what each weighs."""
        if not use.node.args.get("transpose", True):
            return  # groups run along its outputs
        name = use.handle.name
        for index, x, _ in of_each_matrix(use):
            if x is None:
                continue
            tokens = None
            if number is not None:
                known = self.seen[name, index].tokens
                tokens = known.get((self._reader(name, use.node), number))
            yield (name, index), x, tokens if tokens is not None and len(tokens) == len(x) else None

    def kept(self, weight: Weight) -> Hessian:
        """From what `take_in` kept."""
        own = {key: m for key, m in self.moments.items() if key[0] == weight.name}
        return self._hessian(weight, own)

    def of(self, weight: Weight, uses: Sequence[Use]) -> Hessian:
        """From the one reader of a weight, as each batch comes to it."""
        rows: dict[Key, list[tuple[Array, Array | None]]] = defaultdict(list)
        for number, use in enumerate(uses):
            for key, x, tokens in self._rows(use, number):
                rows[key].append((x, tokens))
        later = {key: partial(self._moments_of, each) for key, each in rows.items()}
        return self._hessian(weight, later)

    def _moments_of(self, rows: Sequence[tuple[Array, Array | None]]) -> Moments:
        moments = Moments(rows[0][0].shape[-1], full=self.full)
        for x, tokens in rows:
            moments.add(x, tokens)
        return moments

    def _hessian(
        self, weight: Weight, found: Mapping[Key, Moments | Callable[[], Moments]]
    ) -> Hessian:
        """Of each matrix: a stack's are gathered one by one, as they are asked for."""

        def moments(key: Key) -> Moments:
            one = found[key]
            return one if isinstance(one, Moments) else one()

        everything: Any = 0.0
        if len(found) > 1:
            for key in found:
                everything = everything + moments(key).hessian() / len(found)

        def of(key: Key) -> Array:
            known = key if key in found else (weight.name, ())
            if known not in found:
                return self._with_lookups(known, weight, everything if len(found) > 1 else None)
            own = moments(known)
            mean = own.hessian()
            if len(found) > 1:
                mean = (_PRIOR * everything + own.rows * mean) / (_PRIOR + own.rows)
            return self._with_lookups(known, weight, mean)

        return of

    def gains(self, key: Key, rows: int) -> Array:
        """What an error in each row of a matrix costs."""
        return self.seen[key if key in self.seen else (key[0], ())].gains(rows)

    def _with_lookups(self, key: Key, weight: Weight, mean: Array | None) -> Array:
        """With what errors cost in rows that are looked up."""
        seen = self.seen.get(key, Seen())
        h = np.eye(weight.shape[-1])
        if mean is not None and mean.any():
            h = mean if mean.ndim == 2 else np.diag(mean)
        if seen.looked and seen.count:
            outputs = float(np.mean(seen.outputs)) / seen.count
            each = seen.columns / seen.count / weight.shape[-2]
            return h + np.diag(each / max(outputs, 1e-30))
        return np.diag(seen.columns / seen.looked) if seen.looked else h

    def matrices(self, weight: Weight) -> Iterator[tuple[Key, Array]]:
        """The matrices of a weight: one, or those of a stack."""
        array = weight.array
        if array.ndim == 2:
            yield (weight.name, ()), as_numpy(array)
            return
        for index in np.ndindex(*array.shape[:-2]):
            yield (weight.name, tuple(map(int, index))), as_numpy(array[index])
