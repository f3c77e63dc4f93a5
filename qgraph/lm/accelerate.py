"""`accelerate`: a model of mlx-lm that runs through programs, and is else the same model."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from ..compiler.pipeline import Tune
from ..errors import InputError
from ..mesh import Mesh
from ..quantization.config import Quantize
from ..target import Target, as_target, on_mesh
from .acceleration import Acceleration
from .programs.maker import Maker


def accelerate(
    model: Any,
    *,
    target: Target | str | mx.Device | None = None,
    mesh: Mesh | None = None,
    quantize: Quantize | None = None,
    tune: Tune = "table",
    warm: bool = False,
    background: bool = True,
    keep: bool | Path = True,
) -> Any:
    """A model of mlx-lm that generates through programs.

    Args:
        model: as `mlx_lm.load` gives it.
        target: "cpu", "gpu" or an `mx.Device`; by default MLX's default device.
        mesh: the ranks to spread the model over; each holds its part of the weights and the caches,
            and every rank must make the same calls.  Where several processes were launched, the
            model's own weights are let go as parts of them are packed (each is NaN then), and the
            model given runs through programs too.
        quantize: which float weights to pack for the programs, and how; the model keeps its own.
        tune: as for `qg.optimize`.
        warm: make the programs for a token and for short prompts now.
        background: let the model answer itself while a program is being made; else wait for it.
            On a CPU it is always waited for of more than 64 tokens, and of more than 8 if it was
            made in an earlier start, or in half precision.
        keep: plans and packed weights on disk, in the user's cache or in a folder, so that a second
            start optimizes and packs nothing.

    Returns:
        An object of a subclass of the model's class over the very same modules.  Its `qgraph` says
        which programs there are, what ran without one and why.  Nothing is compiled yet: a program
        is made when a call first needs it, and compared with the model.

    >>> import mlx.core as mx, qgraph as qg
    >>> from mlx_lm.models import cache, llama
    >>> sizes = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=100)
    >>> args = llama.ModelArgs("llama", num_attention_heads=2, rms_norm_eps=1e-5, **sizes)
    >>> model = llama.Model(args)
    >>> fast = qg.lm.accelerate(model, target="cpu", background=False, keep=False)
    >>> kept = cache.make_prompt_cache(fast)
    >>> logits = fast(mx.array([[1, 2, 3, 4]]), cache=kept)
    >>> isinstance(fast, llama.Model), logits.shape, kept[0].offset
    (True, (1, 4, 100), 4)
    >>> print(fast.qgraph.programs[0].form)
    4 tokens, the first, 256 positions
    """
    if not isinstance(model, Module):
        raise InputError(
            f"accelerate takes a model, not one of type {type(model).__name__}",
            hint="give what mlx_lm.load gives first: model, tokenizer = mlx_lm.load(path)",
        )
    where = on_mesh(as_target(target), mesh)
    base: Any = type(model)
    cls = _accelerated(base)
    fast = cls.__new__(cls)
    dict.update(fast, model)
    vars(fast).update(vars(model))
    maker = Maker(cls._own, where, quantize, tune)
    vars(fast)["qgraph"] = Acceleration(fast, maker, background, keep)
    if mesh is not None and not mesh.in_one_process and mesh.size > 1:
        model.__class__ = cls
        vars(model)["qgraph"] = fast.qgraph
    if warm:
        fast.qgraph.warm()
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
