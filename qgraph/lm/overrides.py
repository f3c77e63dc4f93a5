"""What single architectures need beside views of their caches, and why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from .programs.call import Call
from .scans import delta_rule, ssm_step

Patches = Callable[[ModuleType, Any, Call, Sequence[Any]], list[tuple[Any, str, Any]]]
"""What stands for which attribute in a trace, of a module of mlx-lm, the model that is traced (a
copy of its own), the call and its views."""


@dataclass(frozen=True)
class Override:
    """For the models whose code is in one module of mlx-lm.

    Attributes:
        reason: what in the module does not go with buffers of fixed length.
        rank, additive: as `Call` has them.
        whole: does what the model gives depend on how a prompt is cut?  It then reads them itself.
        patches: stands in for parts of the module while it is traced.
    """

    reason: str
    rank: int = 2
    additive: bool = False
    whole: bool = False
    patches: Patches | None = None


class _With:
    """A module with some names of its own."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _counting(module: Any, arange: Callable[[Any, Any], mx.array]) -> _With:
    """NumPy or MLX, `arange` of a position that is an array being `arange`.

    Others may call it meanwhile, with numbers.
    """

    def counted(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(number, mx.array) for number in args):
            return arange(*args)
        return module.arange(*args, **kwargs)

    return _With(module, arange=counted)


def _parts(model: Any, kind: type) -> list[Any]:
    return [part for part in model.modules() if type(part) is kind]


def _gpt_bigcode(module: ModuleType, model: Any, call: Call, views: Sequence[Any]) -> Any:
    def positions(start: mx.array, stop: mx.array) -> mx.array:
        return start + mx.arange(call.count)

    return [(module, "np", _counting(np, positions))]


def _llama4(module: ModuleType, model: Any, call: Call, views: Sequence[Any]) -> Any:
    chunked = views[0]

    def positions(start: mx.array, stop: mx.array) -> mx.array:
        of_keys = start is chunked.start_position and not call.fresh
        return start + mx.arange(chunked.length if of_keys else call.count)

    return [(module, "mx", _counting(mx, positions))]


def _afm7(module: ModuleType, model: Any, call: Call, views: Sequence[Any]) -> Any:
    first = views[-1].at

    def by_position(rope: Any) -> Any:
        return lambda x, offset: rope(x, offset=first)

    layers = _parts(model, module.KVReuseAttention)
    return [(layer, "rope", by_position(layer.rope)) for layer in layers]


def _phi3small(module: ModuleType, model: Any, call: Call, views: Sequence[Any]) -> Any:
    first = views[0].offset

    def of(layer: Any) -> Any:
        def mask(q_len: int, kv_len: int) -> tuple[mx.array, mx.array]:
            size, seen = layer.blocksparse_block_size, first + q_len
            blocks, q_blocks = (seen + size - 1) // size, -(-q_len // size)
            rows = (blocks - q_blocks + mx.arange(q_blocks))[None, :, None]
            columns = mx.arange(-(-kv_len // size))
            heads = mx.arange(1, layer.n_heads + 1)[:, None]
            strided = ((columns[None] + heads) % layer.blocksparse_vert_stride == 0)[:, None]
            near = rows - columns < layer.blocksparse_num_local_blocks
            block = (rows >= columns) & (near | strided)
            block = block.reshape(layer.n_kv_heads, layer.n_q_per_kv, *block.shape[-2:])
            dense = mx.repeat(mx.repeat(block, size, axis=-1), size, axis=-2)
            return block, dense[..., -q_len:, :kv_len] & (mx.arange(kv_len) < seen)

        return mask

    layers = [layer for layer in _parts(model, module.Attention) if layer.block_sparse]
    return [(layer, "_block_sparse_mask", of(layer)) for layer in layers]


def _ssm(module: ModuleType, model: Any, call: Call, views: Sequence[Any]) -> Any:
    scan = module.ssm_update

    def update(x: mx.array, *given: Any, **settings: Any) -> Any:
        step = signature(scan).bind(x, *given, **settings).arguments
        if x.shape[1] > 1 or any(step.get(name) is not None for name in ("mask", "lengths")):
            return scan(x, *given, **settings)
        return ssm_step(**step)

    return [(module, "ssm_update", update)]


def _gated_delta(module: ModuleType, model: Any, call: Call, views: Sequence[Any]) -> Any:
    rule = sys.modules[module.gated_delta_update.__module__]
    return [(rule, "gated_delta_ops", partial(delta_rule, rule.gated_delta_ops))]


_SSM = ("falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "plamo2")
_GATED_DELTA = ("olmo_hybrid", "qwen3_5", "qwen3_next")
OVERRIDES = {
    **dict.fromkeys(_SSM, Override("scans a token as a chunk", patches=_ssm)),
    **dict.fromkeys(_GATED_DELTA, Override("unrolls a prompt's tokens", patches=_gated_delta)),
    "afm7": Override("rotates by the length of the keys", patches=_afm7),
    "glm_moe_dsa": Override("its indexer takes masks of four axes", rank=4),
    "deepseek_v32": Override("its indexer takes masks of four axes", rank=4),
    "gpt_bigcode": Override("counts positions with NumPy", patches=_gpt_bigcode),
    "llama4": Override("counts positions with integers", patches=_llama4),
    "olmo": Override("adds its mask to the scores", additive=True),
    "phi3small": Override("places blocks by the lengths of a call", whole=True, patches=_phi3small),
}
"""By the module of mlx-lm that defines any part of the model."""


def overrides_of(model: Any) -> list[tuple[ModuleType, Override]]:
    """What applies to a model, with the modules of mlx-lm it is for."""
    modules = {type(part).__module__ for part in model.modules()}
    modules |= {base.__module__ for base in type(model).__mro__}
    names = {name.rpartition(".")[2]: name for name in modules if name.startswith("mlx_lm.models.")}
    return [(sys.modules[names[k]], OVERRIDES[k]) for k in sorted(names) if k in OVERRIDES]


@contextmanager
def standing_in(
    found: Sequence[tuple[ModuleType, Override]], model: Any, call: Call, views: Sequence[Any]
) -> Iterator[None]:
    """While this is open modules and model are as the overrides say."""
    before = []
    try:
        for module, override in found:
            patches = override.patches(module, model, call, views) if override.patches else []
            for owner, name, thing in patches:
                before.append((owner, name, getattr(owner, name)))
                setattr(owner, name, thing)
        yield
    finally:
        for owner, name, thing in reversed(before):
            setattr(owner, name, thing)
