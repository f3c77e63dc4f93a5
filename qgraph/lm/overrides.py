"""What single architectures need beside views of their caches, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx

from .call import Call

Patches = Callable[[ModuleType, Call, Sequence[Any]], Mapping[tuple[Any, str], Any]]
"""Of a module of mlx-lm, a call and its views: what stands for which attribute in the trace."""


@dataclass(frozen=True)
class Override:
    """For the models whose code is in one module of mlx-lm.

    Attributes:
        reason: what in the module does not go with buffers of fixed length.
        rank, additive: as `Call` has them.
        patches: stands in for parts of the module while it is traced.
    """

    reason: str
    rank: int = 2
    additive: bool = False
    patches: Patches | None = None


class _With:
    """A module with some names of its own."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _is_array(*numbers: Any) -> bool:
    return any(isinstance(n, mx.array) for n in numbers)


def _gpt_bigcode(module: ModuleType, call: Call, views: Sequence[Any]) -> Any:
    def arange(start: Any, stop: Any) -> Any:
        return start + mx.arange(call.count)

    return {(module, "np"): _With(module.np, arange=arange)}


def _llama4(module: ModuleType, call: Call, views: Sequence[Any]) -> Any:
    chunked = views[0]

    def arange(start: Any, stop: Any) -> mx.array:
        seen = chunked.length if start is chunked.start_position else 0
        if seen and call.fresh:
            seen = call.count
        return start + mx.arange(seen or call.count)

    return {(module, "mx"): _With(mx, arange=arange)}


def _afm7(module: ModuleType, call: Call, views: Sequence[Any]) -> Any:
    first = views[-1].offset

    class At:
        """A rotation by the position of the call, whatever offset it is given."""

        def __init__(self, rope: Any) -> None:
            self.rope = rope

        def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
            return self.rope(x, offset=first)

    attend = module.KVReuseAttention.__call__

    def attention(layer: Any, x: Any, keys: Any, values: Any, mask: Any = None) -> Any:
        view = _With(layer, rope=At(layer.rope))
        return attend(view, x, keys, values, mask)

    return {(module.KVReuseAttention, "__call__"): attention}


def _phi3small(module: ModuleType, call: Call, views: Sequence[Any]) -> Any:
    view = views[0]
    first = view.offset

    def mask(layer: Any, q_len: int, kv_len: int) -> tuple[mx.array, mx.array]:
        size = layer.blocksparse_block_size
        seen = first + q_len
        blocks, q_blocks = (seen + size - 1) // size, -(-q_len // size)
        rows = (blocks - q_blocks + mx.arange(q_blocks))[None, :, None]
        columns = mx.arange(-(-kv_len // size))
        heads = mx.arange(1, layer.n_heads + 1)[:, None]
        strided = ((columns[None] + heads) % layer.blocksparse_vert_stride == 0)[:, None]
        near = rows - columns < layer.blocksparse_num_local_blocks
        block = (rows >= columns) & (near | strided)
        block = block.reshape(layer.n_kv_heads, layer.n_q_per_kv, *block.shape[-2:])
        dense = mx.repeat(mx.repeat(block, size, axis=-1), size, axis=-2)
        dense = dense[..., -q_len:, :kv_len] & (mx.arange(kv_len) < seen)
        return block, dense

    return {(module.Attention, "_block_sparse_mask"): mask}


OVERRIDES = {
    "afm7": Override("rotates by the length of the keys", patches=_afm7),
    "glm_moe_dsa": Override("its indexer takes masks of four axes", rank=4),
    "deepseek_v32": Override("its indexer takes masks of four axes", rank=4),
    "gpt_bigcode": Override("counts positions with NumPy", patches=_gpt_bigcode),
    "llama4": Override("counts positions with integers", patches=_llama4),
    "olmo": Override("adds its mask to the scores", additive=True),
    "phi3small": Override("places blocks by the length of the keys", patches=_phi3small),
}
"""By the module of mlx-lm that defines any part of the model."""


def overrides_of(model: Any) -> list[tuple[ModuleType, Override]]:
    """What applies to a model, with the modules of mlx-lm it is for."""
    import sys

    modules = {type(part).__module__ for part in model.modules()}
    modules |= {base.__module__ for base in type(model).__mro__}
    names = {name.rpartition(".")[2]: name for name in modules if name.startswith("mlx_lm.models.")}
    return [(sys.modules[names[k]], OVERRIDES[k]) for k in sorted(names) if k in OVERRIDES]


@contextmanager
def standing_in(
    found: Sequence[tuple[ModuleType, Override]], call: Call, views: Sequence[Any]
) -> Iterator[None]:
    """While this is open the modules are as their overrides say."""
    before = []
    try:
        for module, override in found:
            for (owner, name), thing in (
                override.patches(module, call, views) if override.patches else {}
            ).items():
                before.append((owner, name, getattr(owner, name)))
                setattr(owner, name, thing)
        yield
    finally:
        for owner, name, thing in reversed(before):
            setattr(owner, name, thing)
