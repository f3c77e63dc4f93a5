"""`accelerate`: a model of mlx-lm that runs through programs, and is else the same model."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import mlx.core as mx

from ..compiler.pipeline import Tune
from ..quantization.config import Quantize
from ..target import Target, as_target
from .acceleration import Acceleration
from .programs import Maker


def accelerate(
    model: Any,
    *,
    target: Target | str | mx.Device | None = None,
    quantize: Quantize | None = None,
    tune: Tune = "table",
) -> Any:
    """An object of a subclass of the model's class, over the very same modules."""
    base: Any = type(model)
    cls = _accelerated(base)
    fast = cls.__new__(cls)
    dict.update(fast, model)
    vars(fast).update(vars(model))
    vars(fast)["qgraph"] = Acceleration(fast, Maker(cls._own, as_target(target), quantize, tune))
    return fast


@functools.cache
def _accelerated(base: Any) -> Any:
    own = base.__call__
    signature = inspect.signature(own)

    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            return own(self, *args, **kwargs)
        names = list(given)
        rest = {name: given[name] for name in names[2:]}
        rest.update(rest.pop("kwargs", {}))
        cache = rest.pop("cache", None)
        return self.qgraph.call(self, given[names[1]], cache, rest)

    namespace = {"__call__": call, "_own": staticmethod(own), "__module__": base.__module__}
    namespace["__doc__"] = base.__doc__
    return type(base.__name__, (base,), namespace)
