"""Choosing a kernel: from a cache of measurements, a shipped table, a cost model, or by measuring.

Sources, in this order: what was measured on this machine before ("cache"); with `tune`, measuring
now ("measured"); the shipped table, where it holds this very problem ("table"); the cost model
("model"); and, with nothing known about the target, plain `qmm` ("default").
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .kernels import Problem, candidates, carry_out, kernel
from .kernels.cache import Cache
from .kernels.cost import CostTable, table_for
from .kernels.cuda_model import estimate as cuda_estimate
from .target import Target, as_target
from .timing import Timing, interleaved

HOPELESS = 6.0
"""A candidate this many times slower than the best in its warm-up is not run again."""


@dataclass(frozen=True)
class Choice:
    """A kernel and why it was chosen.

    Attributes:
        kernel: its name.
        source: "cache", "measured", "table", "model" or "default".
        estimate_us: microseconds it takes; NaN for "default".
        others: the candidates it won against with their microseconds, fastest first.
    """

    kernel: str
    source: str
    estimate_us: float
    others: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        rest = ", ".join(f"{name} {us:.0f}" for name, us in self.others[:3])
        return f"{self.kernel} {self.estimate_us:.0f} µs ({self.source}; {rest or 'no other'})"


def choose(
    problem: Problem,
    *,
    budget: int = 0,
    exact: bool = False,
    tune: bool = False,
    names: Sequence[str] | None = None,
    cache: Cache | None = None,
    table: CostTable | None = None,
) -> Choice:
    """The fastest kernel for a problem.

    Args:
        budget: bytes beyond the packed weight that this product may keep.
        exact: only kernels whose result is that of `mx.quantized_matmul` bit for bit.
        tune: measure what the cache does not hold, and remember it.
        names: kernels to choose from; by default all that apply.
        cache: of measurements; by default the user's.
        table: by default the one shipped for the target.

    >>> choose(Problem(1, 64, 64, mx.float32, "affine", 4, 64), exact=True, names=["qmm"]).kernel
    'qmm'
    """
    names = candidates(problem, budget=budget, exact=exact) if names is None else list(names)
    if len(names) == 1 and not tune:
        return Choice(names[0], "default", math.nan)
    cache = Cache.user() if cache is None else cache
    known = cache.get(problem)
    if all(name in known for name in names):
        return _best({name: known[name] for name in names}, "cache")
    if tune:
        timings = measure(problem, names)
        found = {name: 1e6 * timing.median for name, timing in timings.items()}
        cache.put(problem, found)
        return _best(found, "measured")
    table = table or table_for(problem)
    exactly = {name: table.measured(name, problem) if table else None for name in names}
    if all(us is not None for us in exactly.values()):
        return _best(_known(exactly), "table")
    modelled = _known({name: estimate(name, problem, table) for name in names})
    if "qmm" in names and "qmm" not in modelled:
        return Choice("qmm", "default", math.nan)
    return _best(modelled, "model") if modelled else Choice(names[0], "default", math.nan)


def estimate(name: str, problem: Problem, table: CostTable | None = None) -> float | None:
    """Microseconds of a kernel by the shipped table or the cost model; None if neither knows."""
    table = table or table_for(problem)
    if table is not None and (us := table.measured(name, problem)) is not None:
        return us
    if table is not None and (us := table.estimate(name, problem)) is not None:
        return us
    return cuda_estimate(name, problem) if problem.backend == "cuda" else None


def choose_together(
    problems: Sequence[Problem], *, budget: int = 0, exact: bool = False, **options: Any
) -> list[Choice]:
    """Kernels for one weight at several row counts that share one packed copy.

    The layout chosen is the one that loses least, over all problems and as a product of ratios,
    against a free choice for each.
    """
    free = [choose(p, budget=budget, exact=exact, **options) for p in problems]
    by_layout: dict[tuple[str, ...], list[Choice]] = {}
    for layout in dict.fromkeys(kernel(c.kernel).layout for c in free):
        names = [_of_layout(p, layout, budget, exact) for p in problems]
        if all(names):
            pairs = zip(problems, names, strict=True)
            by_layout[layout] = [choose(p, names=some, **options) for p, some in pairs]
    if not by_layout:
        return [Choice("qmm", "default", math.nan) for _ in problems]
    return min(by_layout.values(), key=lambda cs: sum(math.log(c.estimate_us) for c in cs))


def _of_layout(p: Problem, layout: tuple[str, ...], budget: int, exact: bool) -> list[str]:
    """Kernels of one layout; what runs on the host reads any packed weight."""
    names = candidates(p, budget=budget, exact=exact)
    prefix = "".join(f"{part}+" for part in layout)
    names += [prefix + n for n in names if kernel(n).host and not kernel(n).layout and layout]
    return [n for n in dict.fromkeys(names) if kernel(n).layout == layout]


def _known(found: Mapping[str, float | None]) -> dict[str, float]:
    return {name: us for name, us in found.items() if us is not None}


def _best(found: Mapping[str, float], source: str) -> Choice:
    first, *others = sorted(found.items(), key=lambda item: item[1])
    return Choice(first[0], source, first[1], tuple(others))


def random_operands(problem: Problem, seed: int = 0) -> tuple[mx.array, list[mx.array]]:
    """x (m, k) and packed parts for a problem, of normal numbers, evaluated."""
    key_x, key_w = mx.random.split(mx.random.key(seed))
    shape = (problem.n, problem.k) if problem.transpose else (problem.k, problem.n)
    scales_dtype = problem.scales_dtype or problem.dtype
    w_dtype = scales_dtype if problem.mode == "affine" else problem.dtype
    w = mx.random.normal(shape, key=key_w).astype(w_dtype)
    parts = list(mx.quantize(w, **problem.settings))
    x = mx.random.normal((problem.m, problem.k), key=key_x).astype(problem.dtype)
    mx.eval(x, parts)
    return x, parts


def runs(
    problem: Problem, names: Iterable[str], x: mx.array, parts: Sequence[mx.array], target: Target
) -> dict[str, Callable[[], Any]]:
    """For each kernel a function that carries out the product on x and waits for it.

    On GPUs it does so `calls_at_once(problem)` times, each on a copy of x and of the weight: one
    product is over before the next is sent, and a weight used again would be in the cache.
    """
    from .interpret import Streams  # here, so that choosing needs no lowering

    streams = Streams(target.device)
    copies = [(x, list(parts))]
    for _ in range(1, calls_at_once(problem)):
        copies.append((x + 0, [part + 0 for part in parts]))
    mx.eval(copies)

    def prepared(name: str) -> Callable[[], Any]:
        chosen = kernel(name)
        packed = [chosen.pack(own, problem) for _, own in copies]
        mx.eval(packed)

        def call(*xs: mx.array) -> list[mx.array]:
            pairs = zip(xs, packed, strict=True)
            return [carry_out(chosen, x, own, problem, streams) for x, own in pairs]

        function = call if chosen.host else mx.compile(call)
        return lambda: mx.eval(function(*(x for x, _ in copies)))

    return {name: prepared(name) for name in names}


def calls_at_once(problem: Problem) -> int:
    """Products in one run of what `runs` gives."""
    if problem.backend == "cpu":
        return 1
    return 20 if problem.m <= 128 else 5


def measure(
    problem: Problem,
    names: Sequence[str],
    *,
    repeats: int = 7,
    warmup: int = 2,
    target: Target | None = None,
) -> dict[str, Timing]:
    """Time kernels on random operands, in turn; each under `mx.compile` as in a program.

    A kernel that MLX fails to run is left out, with a warning that says why.

    Args:
        target: where to run, by default MLX's default device.
    """
    target = target or as_target()
    with mx.stream(mx.default_stream(target.device)):
        x, parts = random_operands(problem)
        functions = runs(problem, names, x, parts, target)
        for name in list(functions):
            try:
                functions[name]()
            except (RuntimeError, ValueError) as error:
                warnings.warn(f"{name} fails for {problem}: {error}", stacklevel=2)
                del functions[name]
        timings = interleaved(functions, repeats, warmup, hopeless=HOPELESS)
    calls = calls_at_once(problem)
    return {name: Timing(tuple(s / calls for s in t.seconds)) for name, t in timings.items()}
