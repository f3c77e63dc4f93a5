"""Carry out each quantized product in the way that is fastest for its shape on the target.

MLX has one fixed rule; often another way that it also has is several times faster.  The shapes and
the target are known here, so `choose` (`qgraph/kernels/choice/tuner.py`) picks among the kernels of
`qgraph/kernels`: by measurements cached on this machine, by the table that ships with the package,
or by a cost model.

Rewrites:
    1. `quantized_matmul` with a weight that is constant or a parameter: `packed_matmul`, and, for a
       kernel that reads the weight in a layout of its own, `pack_weight`, which `hoist-quantize`
       moves to the pack or prepare step.
    2. the same weight read by several products with one kernel: packed once, by
       `eliminate-common-subexpressions`.
    3. `gather_qmm`: `packed_gather`.
    4. with a budget, weights that are worth it are kept dense: those first that gain most a byte.
    5. casts of its scales from half precision: kernels on the host read them as they are stored.
    6. on Hopper GPUs `tiled` also where MLX's own is a little faster alone, and for small products:
       `form-grid-regions` joins such products to one launch.
Leaves alone:
    1. products for which MLX's own kernel is best, small ones, or those about which nothing is
       known.
    2. weights that change from call to call: packing them would cost more than it gives.
    3. `quantized_matmul`s with weights in batches, and nodes whose device or stream the user chose.
    4. what other passes do and can do better, as they see the graph around: shards on several
       streams (`assign-streams`), and float32 for half precision (`widen-half`).
    5. kernels that run from the host and save little: a compiled stretch ends before them and
       another begins after, and a loop around them cannot be compiled.

On one target kernels of one layout serve one row and many, but for the dense ones: as MLX packs the
weight, or on Hopper GPUs in tiles.  So all plans of a program share one packed copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from qgraph.analysis.changes import fixed_values
from qgraph.analysis.problems import problem_of
from qgraph.ir.graph import Graph, Node, Value
from qgraph.kernels import Problem, candidates, kernel, plain
from qgraph.kernels.base import HALF
from qgraph.kernels.choice.tuner import Choice, choose
from qgraph.kernels.cuda.arch import capability
from qgraph.kernels.matmul.tiled.experts import TiledGather
from qgraph.kernels.matmul.tiled.product import Tiled
from qgraph.kernels.progress import progress
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import Visit, rewrite
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor, apply

from .shared.casts import cast
from .shared.products import indices_of, is_open, parts_of

_NAME = "choose-kernel"
LEAVING_US = 50.0
"""Waiting for the inputs of a kernel that runs from the host and starting again, microseconds."""
JOINED_US = 5.0
"""What a product saves that a region on CUDA holds, beside others: a launch, microseconds."""


@dataclass(frozen=True)
class Product:
    """A quantized product that may be carried out in another way.

    Attributes:
        old: the node before the pass.
    """

    old: Node
    problem: Problem


@dataclass(frozen=True)
class Picked:
    """The best kernel for a problem, and the best of those that need not run from the host."""

    best: Choice
    compiled: Choice

    @property
    def saved_us(self) -> float:
        saved = self.compiled.estimate_us - self.best.estimate_us
        return 0.0 if math.isnan(saved) else saved


@dataclass(frozen=True)
class ChooseKernel:
    """See the module.

    Args:
        target: device and machine.
        budget: bytes beyond the packed weights that dense copies of weights may take in all.
        exact: only kernels that give the same bits as MLX's own.
        tune: measure what no cache holds; takes seconds a shape.
        min_flops: work below which MLX's own stays: such products take microseconds, and lie
            outside of what tables were measured on; by default 2e5 on CPUs, 4e6 on GPUs and nothing
            where regions hold products.
        gain: how much faster than MLX's own a kernel must be to be taken.
    """

    target: Target | None = None
    budget: int = 0
    exact: bool = False
    tune: bool = False
    min_flops: float | None = None
    gain: float = 1.05
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        products = self._products(graph, as_target(self.target))
        chosen = self._choices(products)
        if not chosen:
            return graph
        return rewrite(graph, lambda inner: _visitor(inner, chosen), self.name)

    def _products(self, graph: Graph, target: Target) -> list[Product]:
        fixed = fixed_values(graph)
        least = _least_flops(target) if self.min_flops is None else self.min_flops
        found = []
        for _, node in graph.walk(regions=False):
            if is_open(node, fixed):
                problem = _problem(node, target)
                if problem.flops >= least:
                    found.append(Product(node, problem))
        return found

    def _choices(self, products: Sequence[Product]) -> dict[int, tuple[Product, Choice]]:
        """For products that leave MLX's own kernel, by the serial of their node."""
        problems = dict.fromkeys(product.problem for product in products)
        picked = {}
        with progress("measuring kernels for products", len(problems)) as done:
            for problem in problems:
                picked[problem] = self._pick(problem, 0)
                done()
        dense = {p: self._pick(p, self.budget) for p in problems} if self.budget else picked
        leaving = _worth_leaving(products, dense)
        chosen = {}
        gains = {}
        for product in products:
            serial, problem = product.old.serial, product.problem
            own, better = (
                pair.best if serial in leaving else pair.compiled
                for pair in (picked[problem], dense[problem])
            )
            chosen[serial] = product, own
            extra = kernel(better.kernel).extra_bytes(problem)
            gain = own.estimate_us - better.estimate_us
            if gain > 0 and extra and self._gains(problem, better):
                gains[serial] = gain / extra, extra, better
        left = self.budget
        for serial, (_, extra, better) in sorted(gains.items(), key=lambda item: -item[1][0]):
            if extra <= left:
                chosen[serial] = chosen[serial][0], better
                left -= extra
        return {
            serial: (product, choice)
            for serial, (product, choice) in chosen.items()
            if not kernel(choice.kernel).left_to_mlx and self._gains(product.problem, choice)
        }

    def _pick(self, problem: Problem, budget: int) -> Picked:
        names = [
            name
            for name in candidates(problem, budget=budget, exact=self.exact)
            if kernel(name).streams == 1
        ]
        pick = partial(choose, problem, budget=budget, exact=self.exact, tune=self.tune)
        best = pick(names=names)
        if not self.exact and _joins(problem):
            best = _preferring(_in_tiles(problem), best)
        if not kernel(best.kernel).host:
            return Picked(best, best)
        return Picked(best, pick(names=[name for name in names if not kernel(name).host]))

    def _gains(self, problem: Problem, choice: Choice) -> bool:
        own = dict(choice.others).get(plain(problem))
        if own is not None and choice.kernel == _in_tiles(problem) and _joins(problem):
            return own + JOINED_US >= choice.estimate_us
        return own is None or own >= self.gain * choice.estimate_us


def _joins(where: Problem | Target) -> bool:
    """Do regions hold products there that are carried out in tiles?"""
    return where.backend == "cuda" and capability(where.arch) == 90


def _in_tiles(problem: Problem) -> str:
    """The kernel of products that regions hold."""
    return TiledGather.name if problem.experts else Tiled.name


def _preferring(name: str, best: Choice) -> Choice:
    """The kernel of that name in place of the best one, if a launch makes up for its time."""
    us = dict(best.others).get(name)
    if us is None or us > best.estimate_us + JOINED_US:
        return best
    others = {**dict(best.others), best.kernel: best.estimate_us}
    del others[name]
    return Choice(name, best.source, us, tuple(sorted(others.items(), key=lambda item: item[1])))


def _least_flops(target: Target) -> float:
    if target.is_cpu:
        return 2e5
    return 0.0 if _joins(target) else 4e6


def _problem(node: Node, target: Target) -> Problem:
    problem = problem_of(node, target)
    # A gathered product has as many rows as its result.
    return problem.replace(m=node.output.type.size // max(1, problem.n))


def _worth_leaving(products: Sequence[Product], picked: Mapping[Problem, Picked]) -> set[int]:
    """Serials of products for which a compiled stretch may end: those of one input wait once."""
    by_input: dict[Value, list[Product]] = {}
    for product in products:
        by_input.setdefault(product.old.operand("x"), []).append(product)
    return {
        product.old.serial
        for together in by_input.values()
        if sum(picked[product.problem].saved_us for product in together) >= LEAVING_US
        for product in together
    }


def _visitor(graph: Graph, chosen: dict[int, tuple[Product, Choice]]) -> Visit:
    def visit(node: Node, old: Node) -> Sequence[Value] | None:
        found = chosen.get(old.serial)
        return None if found is None else _carried_out(node, *found)

    return visit


def _as_stored(packed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Scales before a cast up to float32: kernels on the host widen them as they read, in fewer
    bytes."""
    w, *scales = packed
    sources = [s.value.node.inputs[0] for s in scales if s.value.node.op == "astype"]
    dtypes = {source.dtype for source in sources}
    if len(sources) == len(scales) and len(dtypes) == 1 and dtypes <= set(HALF):
        return (w, *map(Tensor, sources))
    return packed


def _carried_out(node: Node, product: Product, choice: Choice) -> Sequence[Value]:
    problem = product.problem
    record(Entry.of(node, _NAME, "chosen", str(choice), types=(), about=str(problem)))
    chosen = kernel(choice.kernel)
    x, packed = Tensor(node.operand("x")), parts_of(node)
    if chosen.host:  # it computes in float32, and the casts belong to the compiled stretches
        x, problem = cast(x, mx.float32), problem.replace(dtype=mx.float32)
        if not chosen.layout:
            packed = _as_stored(packed)
            problem = problem.replace(scales_dtype=packed[1].dtype)
    static = {"problem": problem, "kernel": choice.kernel}
    if chosen.layout:  # whatever the rows: plans for one and for many share what is packed
        packed = apply("pack_weight", (packed,), static | {"problem": problem.replace(m=1)})
    if node.op == "gather_qmm":
        y = apply("packed_gather", (x, packed), static | indices_of(node))
    else:
        y = apply("packed_matmul", (x, packed), static)
    y = Tensor(y.value.node.replace(kernel=choice.kernel).output)
    return [cast(y, node.output.dtype).value]
