"""`load`: mlx-lm's, for checkpoints that GPTQ or AWQ packed too."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils

from ..errors import InputError, QuantizationError
from ..origin import NOWHERE
from ..quantization.repack import Repacked, repacked
from .source import Source

_ANY = {"group_size": 64, "bits": 4}
"""What mlx-lm wants to hear before it asks each layer's own arrays."""

_MODELS = "give a folder that mlx_lm.convert wrote, or the name of a repository of the hub"


class RepackedLinear(nn.QuantizedLinear):  # type: ignore[name-defined, misc]
    """A packed layer whose scales are wider than its input, or whose columns stand in an order.

    Attributes:
        order: int32 [columns], in the layers that have one: the weight is that of `x[..., order]`.
    """

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = super().__call__(x[..., self.order] if "order" in self else x)
        return y.astype(x.dtype)


class _Repacking:
    """What stands before a model's class while its weights are loaded."""

    packing: dict[str, Any]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        flat: dict[str, mx.array] = {}
        for name, found in repacked(weights, self.packing).items():
            if not isinstance(found, Repacked):
                flat[name] = found
                continue
            parts = {"weight": found.weight, "scales": found.scales, "biases": found.biases}
            parts |= {} if found.order is None else {"order": found.order}
            flat |= {f"{name}.{part}": array for part, array in parts.items()}
        inner = getattr(super(), "sanitize", None)
        return inner(flat) if inner else flat

    def load_weights(self, weights: Iterable[tuple[str, mx.array]], strict: bool = True) -> Any:
        modules = dict(self.named_modules())  # type: ignore[attr-defined]
        weights = list(weights)
        floats = {a.dtype for n, a in weights if not n.endswith((".scales", ".biases", ".order"))}
        for name, array in weights:
            layer, _, part = name.rpartition(".")
            if part != "order" and not (part == "scales" and array.dtype not in floats):
                continue
            module = modules.get(layer)
            if isinstance(module, nn.QuantizedLinear):  # type: ignore[attr-defined]
                module.__class__ = RepackedLinear
                if part == "order":
                    module.order = array
            elif part == "order":
                kind = type(module).__name__
                raise QuantizationError(
                    f"{layer} is a {kind}, and its groups are scattered (desc_act)",
                    hint="only linear layers reorder their input",
                )
        return super().load_weights(weights, strict)  # type: ignore[misc]


def load(path: str | Path, **settings: Any) -> Any:
    """A model and its tokenizer, as `mlx_lm.load` gives them.

    Checkpoints that GPTQ or AWQ (`gemm`) packed, at 2, 3, 4 or 8 bits, become MLX's packed layers
    with the very numbers of the file; mlx-lm's own load takes 4 bits in AWQ's layout, and rounds
    biases.  Where groups are scattered (`desc_act`), a layer reorders its input.

    Args:
        path: a folder, or a repository of Hugging Face's hub.
        settings: what `mlx_lm.load` takes.

    Raises:
        InputError: there is no such model.
        QuantizationError: a packed layout that is not read, or damaged arrays; it names the weight.

    Example:
        model, tokenizer = qg.lm.load("Llama-3-8B-GPTQ")
        model = qg.lm.accelerate(model)
    """
    folder = folder_of(path, settings.pop("revision", None))
    model, *rest = _load(folder, settings)
    Source.note(model, lambda: _load(folder, {**settings, "lazy": True})[0])
    return model, *rest


def check_folder(path: str | Path) -> None:
    """Raises InputError for what can be no repository's name, and is no folder here."""
    name = str(path)
    if not Path(path).exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise InputError(f"there is no folder {path}", hint=_MODELS, origin=NOWHERE)


def folder_of(path: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, brought from the hub if it is the name of a repository.

    Raises:
        InputError: there is none.
    """
    check_folder(path)
    try:
        folder = Path(utils._download(str(path), revision=revision))
    except (OSError, ValueError) as error:  # the hub's errors are of these, its words many
        why = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"there is no folder {path}, and the hub gave no such repository: {why}",
            hint=_MODELS,
            origin=NOWHERE,
        ) from error
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds no model: config.json not found", hint=_MODELS, origin=NOWHERE
        )
    return folder


def _load(folder: Path, settings: dict[str, Any]) -> tuple[Any, ...]:
    packing = _packing(folder)
    if packing is None:
        return tuple(utils.load(str(folder), **settings))

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, args_class = utils._get_classes(config)
        return type("Repacking", (_Repacking, model_class), {"packing": packing}), args_class

    model, config = utils.load_model(
        folder,
        settings.get("lazy", False),
        model_config={**(settings.get("model_config") or {}), "quantization": _ANY},
        get_model_classes=classes,
        trust_remote_code=settings.get("trust_remote_code", False),
    )
    model.__class__ = type(model).__mro__[2]
    if (adapters := settings.get("adapter_path")) is not None:
        model = utils.load_adapters(model, adapters)
        model.eval()
    words = settings.get("tokenizer_config")
    stops = config.get("eos_token_id")
    tokenizer = utils.load_tokenizer(folder, words, eos_token_ids=stops)  # type: ignore[no-untyped-call]
    return (model, tokenizer, config) if settings.get("return_config") else (model, tokenizer)


def _packing(folder: Path) -> dict[str, Any] | None:
    """What the checkpoint says of its packing, if GPTQ or AWQ did it."""
    config = json.loads((folder / "config.json").read_text())
    said = config.get("quantization_config") or config.get("text_config", {}).get(
        "quantization_config"
    )
    packed = said is not None and said.get("quant_method") in ("gptq", "awq")
    return said if packed and "quantization" not in config else None
