"""A fit while it is made: which stage comes after which.

1. A backward pass over the data tells what errors cost (`statistics`), if sensitivity is asked for.
2. The graph runs node after node on its float weights; at each product factors for channels are
   searched (`awq`) and its weight's formats tried (`prices`); a knapsack chooses (`budget`).
3. Factors move to where they belong (`FoldScales`), and the graph runs once more; each weight is
   fitted when it is reached (`numbers`), on inputs that come from fitted weights before it.
   Weights that are read more than once, or in loops, are fitted before, on what the float weights
   gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape

import mlx.core as mx
import numpy as np

from ..ir.graph import Graph, Node
from ..kernels.progress import progress as said
from ..passes import EliminateDeadCode, FoldScales
from ..quantization.config import Quantize
from ..quantization.fitted import Fitted, mark_of
from ..runtime.interpret import Env
from .awq import Scaling, scalings, search
from .learned import Learned, digest
from .numbers import fitted
from .prices import chosen, prices
from .rounding.formats import Format
from .statistics.gathered import Array, Hessian, Statistics
from .statistics.layers import run_layers
from .statistics.walk import Use, Walk
from .store import Store
from .weights import PRODUCTS, Weight, prepared


@dataclass
class Job:
    """One fit; arguments as for `Quantize.fit`."""

    graph: Graph
    config: Quantize
    batches: Sequence[Sequence[mx.array]]
    methods: tuple[str, ...]
    formats: tuple[Format, ...]
    scales: mx.Dtype | None
    result: str
    store: Store

    def run(self, bits: float | None, size: int | None) -> Quantize:
        """Fit all weights under a budget of bits for each number, or of bytes for all."""
        self.graph = EliminateDeadCode()(self.graph)
        self.found = prepared(self.graph, self.config)
        weights = self.found.weights
        total = sum(w.source.type.size for w in weights.values())
        budget = int(size if size is not None else total * (bits or 0) / 8)
        self.bits = 8 * budget / max(total, 1)
        self.options = {n: [f for f in self.formats if w.shape[-1] % f.group_size == 0]
                        for n, w in weights.items()}  # fmt: skip
        whole = bool({"gptq", "sensitivity", "awq"} & {*self.methods})
        self.statistics = Statistics(self.found, full=whole)
        self.costs: dict[str, list[float]] = {}
        self.scalings: dict[str, Scaling] = {}
        self.fitted: dict[str, Fitted] = {}
        self._mark(budget)
        self._recall_or_learn()
        sizes = [self._sizes(w) for w in weights.values()]
        self.chosen = chosen(list(weights.values()), sizes, budget, self.options, self.costs)
        factors = self._fold()
        self._fit_all()
        rules = {escape(name): form.settings for name, form in self.chosen.items()}
        kept = {n: f for n, f in self.fitted.items() if f.method != "rounding" or self.scales}
        return Quantize(where=rules, fitted=kept or None, folded=factors or None)

    # What the float weights tell.

    def _mark(self, budget: int) -> None:
        """Marks of all that what is learned depends on, and of all that the numbers do."""
        if self.store.folder is None:
            self.learning = self.fit = ""
            return
        weights = [(n.args["name"], mark_of(n.args["data"].array)) for n in self.graph.constants()]
        near = self.bits if "awq" in self.methods else None  # in which factors are tried
        said = (weights, sorted(self.options.items()), self.methods, self.result, self.scales, near)
        self.learning = digest(self.batches, *said)
        self.fit = f"{self.learning} {budget}"

    def _recall_or_learn(self) -> None:
        if "awq" in self.methods:
            found = scalings(self.graph, list(self.found.weights))
            self.scalings = {name: one for one in found for name in one.ends}
        known = self.store.learned(self.learning)
        if known is None:
            self._learn()
            factors = {s.source: s.factors for s in self.scalings.values()}
            told = self.statistics
            self.store.keep(Learned(told.seen, told.moments, self.costs, factors), self.learning)
            return
        self.statistics.seen.update(known.seen)
        self.statistics.moments.update(known.moments)
        self.costs = known.costs
        for scaling in self.scalings.values():
            scaling.factors = known.factors.get(scaling.source)

    def _learn(self) -> None:
        weights = self.found.weights
        if "sensitivity" in self.methods:
            self.statistics.listen(self.batches, self.result)
        late = [w for w in weights.values() if not w.waits]
        if not ({"sensitivity", "awq"} & {*self.methods} or (late and self.methods)):
            return
        self._layers(self._learn_at, "trying formats", self.statistics.take_in)
        if "sensitivity" in self.methods:
            for weight in late:
                self._price(weight, self.statistics.kept(weight))

    def _learn_at(self, uses: list[Use]) -> None:
        weight = self.found.weights[uses[0].handle.name]
        if not weight.waits:
            for number, use in enumerate(uses):
                self.statistics.take_in(use, number)
            return
        if not {"sensitivity", "awq"} & {*self.methods}:
            return
        hessian = self.statistics.of(weight, uses)
        scaling = self.scalings.get(weight.name)
        if scaling is not None and not scaling.searched:
            self._search(scaling, weight, hessian)
        if "sensitivity" in self.methods:
            self._price(weight, hessian)

    def _search(self, scaling: Scaling, reached: Weight, hessian: Hessian) -> None:
        """Factors for channels when the first weight at their end is reached."""
        near = [f for f in self.options[reached.name] if f.mode == "affine"] or list(self.formats)
        size = self.dtype(reached).size
        form = min(near, key=lambda f: abs(f.bits_per_weight(size) - self.bits))
        rows: dict[str, tuple[Array, Array]] = {}
        for name in scaling.ends:
            weight = self.found.weights.get(name)
            if weight is not None and weight.shape[-1] % form.group_size == 0:
                key, w = next(iter(self.statistics.matrices(weight)))
                rows[name] = w, self.statistics.gains(key, len(w))
        if rows:
            h = hessian((reached.name, ()))
            search(scaling, rows, h, form, self.dtype(reached), self.methods)

    def _price(self, weight: Weight, hessian: Hessian) -> None:
        options, factors = self.options[weight.name], self._factors(weight)
        self.costs[weight.name] = prices(
            self.statistics, weight, hessian, options, self.dtype(weight), self.methods, factors
        )

    def _factors(self, weight: Weight) -> Array | None:
        scaling = self.scalings.get(weight.name)
        if scaling is None or scaling.factors is None:
            return None
        factors: Array = scaling.factors[scaling.ends[weight.name]]
        return factors

    def dtype(self, weight: Weight) -> mx.Dtype:
        """Of affine scales."""
        return self.scales or weight.array.dtype

    def _sizes(self, weight: Weight) -> list[int]:
        size = self.dtype(weight).size
        return [form.bytes(weight.shape, size) for form in self.options[weight.name]]

    # Weights.

    def _fold(self) -> dict[str, mx.array]:
        """Move factors that were found to where they belong; the graph is another then."""
        found = {s.source: s.factors for s in self.scalings.values() if s.factors is not None}
        factors = {name: mx.array(each) for name, each in found.items()}
        if factors:
            self.found = prepared(FoldScales(factors)(self.graph), self.config)
            self.statistics.on(self.found)
        return factors

    def _fit_all(self) -> None:
        for weight in self.found.weights.values():
            if not weight.waits or not self.methods:  # plain rounding needs no data
                self._fit(weight, self._kept(weight))
        if not self.methods:
            return
        self._layers(self._fit_at, "fitting weights", None)

    def _kept(self, weight: Weight) -> Hessian:
        """Of inputs from before factors moved, as they are since."""
        hessian, factors = self.statistics.kept(weight), self._factors(weight)
        return hessian if factors is None else lambda key: hessian(key) / np.outer(factors, factors)

    def _fit_at(self, uses: list[Use]) -> None:
        weight = self.found.weights[uses[0].handle.name]
        if weight.waits and weight.name not in self.fitted:
            self._fit(weight, self.statistics.of(weight, uses))

    def _fit(self, weight: Weight, hessian: Hessian) -> None:
        name, form = weight.name, self.chosen[weight.name]
        mark = mark_of(weight.array)
        kept = self.store.read(name, form, mark, self.fit)
        if kept is None:
            costs = self.costs.get(name, [])
            priced = list(zip(self._sizes(weight), costs, strict=True)) if costs else []
            dtype = self.dtype(weight)
            kept = fitted(self.statistics, weight, hessian, form, dtype, self.methods, mark, priced)
            self.store.write(name, kept, self.fit)
        self.fitted[name] = kept

    def _layers(
        self, at: Callable[[list[Use]], None], what: str, inside: Callable[[Use], None] | None
    ) -> None:
        """Run the graph on all batches.

        Args:
            at: called at each product with a weight to fit, with its use in each batch.
            inside: called for products in loops.
        """
        nodes = self.found.graph.nodes
        weights = self.found.weights.values()
        tops = [n for n in nodes if n.op in PRODUCTS or n.bodies]
        users = [n for n in tops if n.bodies or any(n in w.uses for w in weights)]
        until = users[-1] if users and not users[-1].bodies else None
        walk = Walk(self.found, self.fitted)
        top = set(nodes)

        def heard(use: Use) -> None:
            if inside is not None and use.node not in top and use.x is not None:
                inside(use)

        walk.listener = heard
        with said(what, len(tops)) as step:

            def before(node: Node, envs: list[Env]) -> None:
                if node.op in PRODUCTS:
                    uses = [use for env in envs if (use := walk.use(node, env)) is not None]
                    if uses:
                        at(uses)
                if node.op in PRODUCTS or node.bodies:
                    step()

            run_layers(walk, self.batches, before, until)
