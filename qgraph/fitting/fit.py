"""`fit`: bits, groups and numbers for the weights of a graph, from data and a budget.

1. A backward pass over the data tells what errors cost (`backward`), if sensitivity is asked for.
2. The graph runs layer after layer on its float weights; each weight's formats are tried and what
   they cost is noted, from the Hessian of the weight's inputs; a knapsack chooses (`budget`).
3. The graph runs once more; each weight is fitted when it is reached, on inputs that come from
   fitted weights before it.  Weights that are read more than once, or in loops, are fitted before,
   on what the float weights gave them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from ..errors import InputError
from ..importer import from_mlx
from ..ir.graph import Graph, Node
from ..kernels.progress import progress as said
from ..quantization.config import Quantize
from ..quantization.fitted import Fitted, mark_of
from ..runtime.interpret import Env
from ..tracing.trace import trace
from ..tree import flatten
from .backward import backward, of_logits, of_values, rows_of
from .budget import cheapest
from .formats import FORMATS, Format, as_numpy, packed
from .gptq import damped, error, factor, gptq, nearest, refined, root
from .layers import run_layers
from .moments import Moments
from .store import Store
from .weights import PRODUCTS, Handle, Prepared, Use, Walk, Weight, prepared

METHODS = ("scales", "gptq", "sensitivity")
_SAMPLED = 160
"""Rows of a matrix on which formats are tried."""
_ROWS = 8192
"""Rows that are fitted at a time."""

Key = tuple[str, tuple[int, ...]]
"""A weight's name, and which matrix of a stack it is."""


def fit(
    model: Graph | Module | Callable[..., Any],
    data: Iterable[Any],
    *,
    bits: float | None = None,
    bytes: int | None = None,
    methods: Sequence[str] = METHODS,
    formats: Sequence[Mapping[str, Any]] | None = None,
    where: Any = None,
    result: str = "values",
    scales: mx.Dtype | None = None,
    folder: Any = None,
) -> Quantize:
    """See `Quantize.fit`."""
    batches = [_arrays(item) for item in data]
    if not batches:
        raise InputError("fit: data is empty", hint="give one or more inputs of the function")
    config = where if isinstance(where, Quantize) else Quantize(bits=8, group_size=32, where=where)
    graph = _graph(model, batches)
    _check(methods, bits, bytes, result, graph, batches)
    found = prepared(graph, config)
    job = _Fit(found, batches, tuple(methods), _formats(formats), scales, result, Store.of(folder))
    return job.run(bits, bytes)


def _arrays(item: Any) -> list[mx.array]:
    leaves, _ = flatten(item)
    return [mx.array(array) for array in leaves]


def _graph(model: Any, batches: Sequence[Sequence[mx.array]]) -> Graph:
    if isinstance(model, Graph):
        return model
    if not callable(model):
        raise InputError(f"fit: {type(model).__name__} is no graph, module or function")
    make = from_mlx if isinstance(model, Module) else trace
    graph: Graph = make(model, *batches[0])
    return graph


def _check(
    methods: Sequence[str], bits: Any, size: Any, result: str, graph: Graph, batches: Any
) -> None:
    for method in methods:
        if method not in METHODS:
            raise InputError(f"fit: methods has {method!r}", hint=f"there are {', '.join(METHODS)}")
    if (bits is None) == (size is None):
        raise InputError("fit: give either bits, a mean over weights, or bytes, of all of them")
    if result not in ("values", "logits"):
        raise InputError(f"fit: result={result!r}", hint="it is 'values' or 'logits'")
    wanted = [v.type for v in graph.inputs]
    for i, batch in enumerate(batches):
        given = [(a.shape, a.dtype) for a in batch]
        if given != [(t.shape, t.dtype) for t in wanted]:
            types = ", ".join(map(str, wanted))
            raise InputError(
                f"fit: item {i} of data does not fit the graph, which takes {types}",
                hint="cut or pad all items to one shape",
            )


def _formats(given: Sequence[Mapping[str, Any]] | None) -> tuple[Format, ...]:
    if given is None:
        return FORMATS
    settings = [Quantize(**one).settings for one in given]
    return tuple(Format(s["mode"], s["bits"], s["group_size"]) for s in settings)


@dataclass
class _Seen:
    """What is known of one matrix.

    Attributes:
        outputs: mean squares of the gradients at its outputs, or None.
        columns: those at rows that were looked up, or None.
        tokens: what each row of input weighs, by node and batch.
    """

    outputs: Any = 0.0
    columns: Any = 0.0
    count: int = 0
    looked: int = 0
    tokens: dict[tuple[Node, int], Any] = field(default_factory=dict)


@dataclass
class _Fit:
    """One fit while it is made."""

    found: Prepared
    batches: Sequence[Sequence[mx.array]]
    methods: tuple[str, ...]
    formats: tuple[Format, ...]
    scales: mx.Dtype | None
    result: str
    store: Store

    def run(self, bits: float | None, size: int | None) -> Quantize:
        weights = self.found.weights
        total = sum(w.source.type.size for w in weights.values())
        budget = int(size if size is not None else total * (bits or 0) / 8)
        self.seen: dict[Key, _Seen] = defaultdict(_Seen)
        self.moments: dict[Key, Moments] = {}
        self.costs: dict[str, list[float]] = {}
        options = {n: [f for f in self.formats if w.shape[-1] % f.group_size == 0]
                   for n, w in weights.items()}  # fmt: skip
        self.options = options
        early = any(not w.waits for w in weights.values())
        if "sensitivity" in self.methods:
            self._listen()
        if "sensitivity" in self.methods or early:
            self._layers(self._try_formats, "trying formats")
        if "sensitivity" in self.methods:
            for weight in weights.values():
                if not weight.waits:
                    self._price(weight)
        chosen = self._choose(budget)
        self.fitted: dict[str, Fitted] = {}
        self.chosen = chosen
        for weight in weights.values():
            if not weight.waits:
                self._fit(weight)
        self._layers(self._fit_reached, "fitting weights")
        return self._quantize()

    def dtype(self, weight: Weight) -> mx.Dtype:
        return self.scales or weight.array.dtype

    # Sensitivity.

    def _listen(self) -> None:
        """Backward passes: what errors cost at each output, and how much each token weighs."""
        seed = of_logits() if self.result == "logits" else of_values()
        with said("gradients", len(self.batches)) as step:
            for number, batch in enumerate(self.batches):
                walk = Walk(self.found)

                def heard(use: Use, gradient: mx.array, number: int = number) -> None:
                    seen = self.seen[use.handle.name, use.handle.index or ()]
                    squares = rows_of(gradient) ** 2
                    if use.x is None:
                        seen.columns = seen.columns + squares.sum(0)
                        seen.looked += len(squares)
                        return
                    seen.outputs = seen.outputs + squares.sum(0)
                    seen.count += len(squares)
                    seen.tokens[use.node, number] = squares.sum(1)

                backward(walk, batch, seed, heard)
                step()
        for seen in self.seen.values():
            every = np.concatenate(list(seen.tokens.values())) if seen.tokens else np.ones(1)
            mean = float(every.mean()) or 1.0
            # A token weighs at least a tenth of the mean: some may not have been heard enough.
            seen.tokens = {k: np.maximum(v / mean, 0.1) for k, v in seen.tokens.items()}

    # Layers.

    def _layers(self, at: Callable[[Node, list[Env], Walk], None], what: str) -> None:
        weights = self.found.weights
        nodes = self.found.graph.nodes
        tops = [n for n in nodes if n.op in PRODUCTS or n.bodies]
        users = [n for n in tops if n.bodies or any(n in w.uses for w in weights.values())]
        until = users[-1] if users and not users[-1].bodies else None
        walk = Walk(self.found, self.__dict__.get("fitted", {}))
        top = set(nodes)

        def heard(use: Use) -> None:
            if use.node not in top and use.x is not None and what == "trying formats":
                self._moments(use.handle).add(use.x)

        walk.listener = heard
        with said(what, len(tops)) as step:

            def before(node: Node, envs: list[Env]) -> None:
                if node.op in PRODUCTS:
                    at(node, envs, walk)
                if node.op in PRODUCTS or node.bodies:
                    step()

            run_layers(walk, self.batches, before, until)

    def _moments(self, handle: Handle) -> Moments:
        key = handle.name, handle.index or ()
        if key not in self.moments:
            columns = self.found.weights[handle.name].shape[-1]
            self.moments[key] = Moments(columns, full=self._full)
        return self.moments[key]

    @property
    def _full(self) -> bool:
        return "gptq" in self.methods or "sensitivity" in self.methods

    def _gather(self, node: Node, envs: list[Env], handle: Handle) -> None:
        moments = self._moments(handle)
        if not node.args.get("transpose", True):
            return  # groups run along its outputs
        tokens = self.seen[handle.name, handle.index or ()].tokens
        for number, env in enumerate(envs):
            x = env[node.operand("x")]
            weights = tokens.get((node, number))
            fits = weights is not None and weights.size * x.shape[-1] == x.size
            moments.add(x, weights if fits else None)

    def _handle(self, node: Node, envs: list[Env]) -> Handle | None:
        handles = [envs[0][v] for v in node.inputs if isinstance(envs[0].get(v), Handle)]
        return handles[0] if handles else None

    def _try_formats(self, node: Node, envs: list[Env], walk: Walk) -> None:
        handle = self._handle(node, envs)
        if handle is None:
            return
        weight = self.found.weights[handle.name]
        if "sensitivity" in self.methods or not weight.waits:
            self._gather(node, envs, handle)
        if "sensitivity" in self.methods and weight.waits:
            self._price(weight)
            self._forget(weight)

    def _forget(self, weight: Weight) -> None:
        for key in [k for k in self.moments if k[0] == weight.name]:
            del self.moments[key]

    def _fit_reached(self, node: Node, envs: list[Env], walk: Walk) -> None:
        handle = self._handle(node, envs)
        if handle is None or not self.found.weights[handle.name].waits:
            return
        if handle.name not in self.fitted:
            self._gather(node, envs, handle)
            self._fit(self.found.weights[handle.name])

    # One weight.

    def _hessian(self, key: Key, columns: int) -> np.ndarray[Any, Any]:
        """Of the inputs of products and, for rows that are looked up, of what they cost."""
        moments, seen = self.moments.get(key), self.seen[key]
        h = np.eye(columns)
        if moments is not None and moments.mean().any():
            mean = moments.mean()
            h = mean if mean.ndim == 2 else np.diag(mean)
        if seen.looked and seen.count:
            outputs = float(np.mean(seen.outputs)) / seen.count
            rows = self.found.weights[key[0]].shape[-2]
            h = h + np.diag(seen.columns / seen.count / rows / max(outputs, 1e-30))
        elif seen.looked:
            h = np.diag(seen.columns / seen.looked)
        return h

    def _matrices(self, weight: Weight) -> Iterable[tuple[Key, np.ndarray[Any, Any]]]:
        """The matrices of a weight: one, or those of a stack."""
        array = weight.array
        if array.ndim == 2:
            yield (weight.name, ()), as_numpy(array)
            return
        for index in np.ndindex(*array.shape[:-2]):
            key = weight.name, tuple(map(int, index))
            known = key in self.moments or key in self.seen
            yield (key if known else (weight.name, ())), as_numpy(array[index])

    def _price(self, weight: Weight) -> None:
        """What each format of a weight would cost at the result."""
        costs = np.zeros(len(self.options[weight.name]))
        dtype, search = self.dtype(weight), "scales" in self.methods
        for key, w in self._matrices(weight):
            seen = self.seen[key]
            h = damped(self._hessian(key, w.shape[1]))
            gains = np.ones(len(w)) if not seen.count else seen.outputs / seen.count
            if not seen.count and seen.looked:
                gains = np.full(len(w), 1 / len(w))
            picked = np.arange(0, len(w), max(1, len(w) // _SAMPLED))
            share = gains.sum() / max(gains[picked].sum(), 1e-30)
            makes_up = "gptq" in self.methods
            weighs = np.diag(root(h)) ** 2 if makes_up else np.diag(h)
            weighs = weighs.astype(np.float32)
            for i, form in enumerate(self.options[weight.name]):
                rounded = nearest(w[picked], form, dtype, weighs if search else None)
                away = rounded.values() - w[picked]
                each = (away**2) @ weighs if makes_up else ((away @ h) * away).sum(1)
                costs[i] += share * float((gains[picked] * each).sum()) / 2
        self.costs[weight.name] = costs.tolist()

    def _choose(self, budget: int) -> dict[str, Format]:
        weights = list(self.found.weights.values())
        sizes = [
            [f.bytes(w.shape, self.dtype(w).size) for f in self.options[w.name]] for w in weights
        ]
        if "sensitivity" in self.methods:
            picked = cheapest(sizes, [self.costs[w.name] for w in weights], budget)
        else:
            picked = self._uniform(weights, sizes, budget)
        if picked is None:
            least = sum(map(min, sizes))
            raise InputError(
                f"fit: {budget:,} bytes are too few: the smallest formats take {least:,}",
                hint="give more bits or bytes, or more formats",
            )
        return {w.name: self.options[w.name][i] for w, i in zip(weights, picked, strict=True)}

    def _uniform(
        self, weights: Sequence[Weight], sizes: list[list[int]], budget: int
    ) -> list[int] | None:
        """The most bits that all weights can have, in the group size that comes first."""
        order = sorted(set(self.formats), key=lambda f: (f.mode != "affine", -f.bits,
                                                         abs(f.group_size - 64)))  # fmt: skip
        for form in order:
            places = [self.options[w.name].index(form) if form in self.options[w.name] else -1
                      for w in weights]  # fmt: skip
            if -1 in places:
                continue
            if sum(s[i] for s, i in zip(sizes, places, strict=True)) <= budget:
                return places
        return None

    def _fit(self, weight: Weight) -> None:
        name, form, dtype = weight.name, self.chosen[weight.name], self.dtype(weight)
        mark = mark_of(weight.array)
        kept = self.store.read(name, form, mark, self.methods)
        if kept is not None:
            self.fitted[name] = kept
            return
        parts, away, whole = [], 0.0, 0.0
        for key, w in self._matrices(weight):
            h = self._hessian(key, w.shape[1])
            for start in range(0, len(w), _ROWS):
                some = w[start : start + _ROWS]
                rounded, how = self._rounded(some, h, form, dtype)
                parts.append(packed(rounded.places, rounded.scales, rounded.biases, form, dtype))
                away += float(error(some, h, rounded).sum())
                whole += float(((some @ h) * some).sum())
        self._forget(weight)
        arrays: list[Any] = [
            None if part[0] is None else mx.concatenate(list(part)).reshape(*weight.shape[:-1], -1)
            for part in zip(*parts, strict=True)
        ]
        mx.eval([a for a in arrays if a is not None])
        costs = self.costs.get(name, []) if self.seen else []
        cost = costs[self.options[name].index(form)] if costs else None
        sizes = [option.bytes(weight.shape, dtype.size) for option in self.options[name]]
        prices = list(zip(sizes, costs, strict=True)) if costs else []
        share = (max(away, 0.0) / max(whole, 1e-30)) ** 0.5
        words, scales, biases = arrays
        settings = (form.bits, form.group_size, form.mode)
        made = Fitted(words, scales, biases, *settings, mark, how, share, cost, prices)
        self.fitted[name] = made
        self.store.write(name, made, self.methods)

    def _rounded(self, w: Any, h: Any, form: Format, dtype: mx.Dtype) -> tuple[Any, str]:
        search = "scales" in self.methods
        if "gptq" in self.methods and np.count_nonzero(h - np.diag(np.diag(h))):
            h = damped(h)
            rounded = gptq(w, factor(h), form, dtype, search=search)
            return (refined(w, h, rounded, dtype) if search else rounded), "gptq"
        importance = np.diag(damped(h)).astype(np.float32) if search else None
        return nearest(w, form, dtype, importance), "scales" if search else "rounding"

    def _quantize(self) -> Quantize:
        from glob import escape

        rules = {escape(name): form.settings for name, form in self.chosen.items()}
        fitted = {n: f for n, f in self.fitted.items() if f.method != "rounding" or self.scales}
        return Quantize(where=rules, fitted=fitted or None)
