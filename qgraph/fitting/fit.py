"""`Quantize.fit`: what it is given, checked, and handed to a `Job`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from ..errors import InputError
from ..importer import from_mlx
from ..ir.graph import Graph
from ..quantization.config import Quantize
from ..tracing.trace import trace
from ..tree import flatten
from .job import Job
from .rounding.formats import FORMATS, Format
from .store import Store

DEFAULT = ("scales", "gptq", "sensitivity")
METHODS = (*DEFAULT, "awq")


def fit(
    model: Graph | Module | Callable[..., Any],
    data: Iterable[Any],
    *,
    bits: float | None = None,
    bytes: int | None = None,
    methods: Sequence[str] = DEFAULT,
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
    tried, store = _formats(formats), Store.of(folder)
    job = Job(graph, config, batches, tuple(methods), tried, scales, result, store)
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
