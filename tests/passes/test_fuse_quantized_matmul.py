"""Every numbered case of fusion, with the weight in three places, in every mode.

Text and numbers: against NumPy in float64 on the weight that `tests/support/reference.py`
dequantizes.  The table is `tests/support/fusion_cases.py`; what is worth a test of its own is in
`tests/passes/test_fusion_details.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qgraph as qg
from qgraph.compiler.plan import Plan
from qgraph.ir import Graph
from qgraph.passes import Legalize
from tests.support import reference
from tests.support.arrays import to_numpy
from tests.support.fusion import (
    COARSE,
    FORMATS,
    PASSES,
    Weight,
    check,
    not_compiled,
    ops,
    optimized,
    random,
    reasons,
    wide,
)
from tests.support.fusion_cases import CASES, Case, Given, target
from tests.support.fusion_near_misses import NEAR_MISSES, NearMiss
from tests.support.in_numpy import InNumPy
from tests.support.random_graphs import ROWS, SPELLINGS, K, parameters, products_in, programs, run

ORIGINS = ("constant", "parameter", "carried")
TURNS = 2


def _x(case: Case | NearMiss) -> mx.array:
    if isinstance(case.x, mx.array):
        return case.x
    return random(*case.x, seed=1).astype(case.dtype)


def _weights(case: Case | NearMiss, form: str) -> list[Weight]:
    return [Weight(form, random(*case.w, seed=i), case.dtype) for i in (2, 3)]


def _values(case: Case | NearMiss, weight: Weight) -> list[mx.array]:
    return [weight.float] if case.is_float else list(weight.parts)


def _in_loop(case: Case | NearMiss, weight: Weight, like: Plan) -> Any:
    """The sum over turns that swap two carried weights."""

    def fn(a: Any, b: Any, x: Any) -> Any:
        def turn(i: Any, carry: Any) -> Any:
            sums, now, later = carry
            results, _ = qg.tree.flatten(case.model(Given(weight, tuple(now)), x))
            return [s + r for s, r in zip(sums, results, strict=True)], later, now

        zeros = [qg.zeros(v.shape, v.dtype) for v in like.graph.outputs]
        return qg.fori_loop(0, TURNS, turn, (zeros, a, b))[0]

    return fn


def _plan(case: Case | NearMiss, form: str, origin: str, **options: Any) -> tuple[Plan, list[Any]]:
    """A plan, and what to call it with."""
    weights, x = _weights(case, form), _x(case)
    weight = weights[0]
    values = [_values(case, w) for w in weights]
    parts = tuple(values[0])
    plan = optimized(lambda x: case.model(Given(weight, parts), x), x, **options)
    if origin == "constant":
        return plan, [x]

    def fn(given: Any, x: Any) -> Any:
        return case.model(Given(weight, tuple(given)), x)

    if origin == "parameter":
        return optimized(fn, values[0], x, parameters=[0], **options), [values[0], x]
    args = [*values, x]
    return optimized(_in_loop(case, weight, plan), *args, **options), args


def _expected(case: Case, form: str, origin: str) -> list[Any]:
    results = [case.expected(w.dense, wide(_x(case))) for w in _weights(case, form)]
    first, second = (r if isinstance(r, list) else [r] for r in results)
    if origin != "carried":
        return first
    return [a + b for a, b in zip(first, second, strict=True)]


def _dequantized(graph: Graph) -> list[int]:
    """Elements of each `dequantize`."""
    return [n.output.type.size for _, n in graph.walk() if n.op == "dequantize"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cases(case: Case, origin: str, form: str) -> None:
    if not case.formats(form):
        pytest.skip("cannot be written in this format")
    plan, args = _plan(case, form, origin, passes=[*PASSES, Legalize(target(case))])
    found = ops(plan.graph)
    assert set(case.has) <= set(found)
    assert not set(case.gone) & set(found)
    assert any(e.case == case.in_ledger for e in plan.ledger()), plan.ledger()
    if case.number == 6:
        assert _dequantized(plan.graph) == [_x(case).size * case.w[-1]]
    dtypes = {case.dtype, *(v.dtype for v in plan.graph.outputs)}
    check(plan, args, _expected(case, form, origin), max(COARSE[d] for d in dtypes))


def _texts() -> list[tuple[str, str, str, str]]:
    """Case, format, origin and the optimized graph's text, from `tests/passes/fusion_cases.txt`."""
    blocks = Path(__file__).with_name("fusion_cases.txt").read_text().strip().split("\n\n")
    heads, texts = zip(*(block.split("\n", 1) for block in blocks), strict=True)
    return [(*head.split("; "), text) for head, text in zip(heads, texts, strict=True)]


@pytest.mark.parametrize(("name", "form", "origin", "text"), _texts())
def test_texts(name: str, form: str, origin: str, text: str) -> None:
    case = next(c for c in CASES if c.id == name)
    plan, _ = _plan(case, form, origin, passes=[*PASSES, Legalize(target(case))])
    assert plan.graph.format(origins=False) == text


def test_every_case_has_a_text() -> None:
    assert {name.split()[0] for name, *_ in _texts()} == {str(c.number) for c in CASES}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("miss", NEAR_MISSES, ids=lambda miss: miss.id)
def test_near_misses(miss: NearMiss, origin: str, form: str) -> None:
    plan, args = _plan(miss, form, origin)
    assert _dequantized(plan.graph)
    assert miss.words in reasons(plan)
    with not_compiled():
        results = [
            qg.tree.flatten(qg.compile(g, passes=[], target="cpu")(*args))[0]
            for g in (plan.source, plan.graph)
        ]
    for written, now in zip(*results, strict=True):
        assert mx.allclose(written, now, rtol=1e-5, atol=1e-4)


MODES = {
    mode: [form for form, settings in FORMATS.items() if settings["mode"] == mode]
    for mode in ("affine", "mxfp4", "mxfp8", "nvfp4")
} | {"all": list(FORMATS)}
EXAMPLES = int(os.environ.get("QGRAPH_EXAMPLES", "110"))
"""Of each mode: 550 in all, the same at every run.  Given a number, so many others."""
IN_ALL = 2e-4
"""Relative error of a whole program of float32 steps, some of them chained ten deep."""


SETTINGS = settings(
    max_examples=EXAMPLES,
    derandomize="QGRAPH_EXAMPLES" not in os.environ,
    print_blob=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mode", MODES)
@SETTINGS
@given(data=st.data())
def test_random_graphs(mode: str, data: st.DataObject) -> None:
    """As written, optimized, and in float64 the same; each pass keeps its contract."""
    program = data.draw(programs(MODES[mode]), label="program")
    x, weights = random(ROWS, K, seed=1), parameters(MODES[mode])
    graph = qg.trace(lambda w, x: run(program, w, x), weights, x, parameters=[0])
    plan = qg.optimize(graph, target="cpu")
    arrays = qg.tree.flatten(((weights, x), {}), static=True)[0]
    (expected,) = InNumPy().run(graph, [wide(a) for a in arrays])
    with not_compiled():
        for each in (graph, plan.graph):
            actual = to_numpy(qg.compile(each, passes=[], target="cpu")(weights, x))
            assert reference.relative_error(actual, expected) < IN_ALL, f"{each}"
        plan.check(weights, x)
    # What changes from turn to turn, and slices that are computed first, cannot leave the loop.
    stays = {("carried", s) for s in SPELLINGS} | {("scanned", "faked"), ("indexed", "faked")}
    if not any((p.origin, p.spelling) in stays for p in products_in(program)):
        stages = [n.stage for _, n in plan.graph.walk() if n.op == "quantize"]
        assert "run" not in stages, f"a quantize was not hoisted\n{plan.graph}"


@settings(SETTINGS, max_examples=EXAMPLES // 2)
@given(program=programs(["affine-4-32"]), form=st.sampled_from(list(FORMATS)))
def test_random_graphs_whose_weights_are_quantized(program: tuple[Any, ...], form: str) -> None:
    """Compared with dense weights that went through quantization, by `plan.check`."""
    x, weights = random(ROWS, K, seed=1), parameters(["affine-4-32"])
    graph = qg.trace(lambda w, x: run(program, w, x), weights, x, parameters=[0])
    kind = FORMATS[form]
    config = qg.Quantize(bits=kind["bits"], group_size=kind["group_size"], mode=kind["mode"])
    qg.optimize(graph, quantize=config, target="cpu").check(weights, x)
