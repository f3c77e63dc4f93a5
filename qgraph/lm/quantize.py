"""`quantize`: a folder of mlx-lm, packed with the bits and the numbers that a fit finds for it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils

from ..compiler.api import compile
from ..errors import InputError
from ..importer import from_mlx
from ..ir.graph import Graph
from ..origin import NOWHERE
from ..passes import EliminateDeadCode, FoldScales
from ..quantization.config import Quantize
from ..quantization.fitted import Fitted
from .load import load

_BASE = {"group_size": 64, "bits": 4}
"""What the folder's config says of layers that it does not name; it names all that are packed."""


@dataclass(frozen=True)
class Packed:
    """What came of it.

    Attributes:
        folder: that `mlx_lm.load` opens.
        config: how each weight was packed, and the numbers.
        before, after: perplexity on the part of the text that was not fitted on, of the model as
            it was and as it is in the folder.
    """

    folder: Path
    config: Quantize
    before: float
    after: float

    @property
    def weights(self) -> dict[str, Fitted]:
        return dict(self.config.fitted or {})


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    bits: float | None = None,
    bytes: int | None = None,
    methods: Sequence[str] = ("scales", "gptq", "sensitivity"),
    length: int = 512,
    pieces: int = 8,
) -> Packed:
    """Pack a model of mlx-lm as well as can be for its bytes, and write it as mlx-lm writes one.

    Args:
        model: a folder or a repository with float weights.
        out: the folder to write; it may be there from a run that was broken off, which goes on.
        data: a text file.  The last piece of it measures, the others are fitted on.
        bits, bytes, methods: as for `Quantize.fit`; one of bits and bytes.
        length: tokens of a piece.
        pieces: how many pieces to fit on, at most.

    Raises:
        InputError: a model that is packed already, a text of less than two pieces, a budget below
            the smallest formats.
    """
    out = Path(out)
    network, tokenizer, config = load(model, return_config=True)
    if "quantization" in config:
        raise InputError(
            f"{model} is packed already", hint="give the float weights", origin=NOWHERE
        )
    *fitting, measuring = _pieces(tokenizer, Path(data), length, pieces + 1)
    before = _perplexity(compile(network, measuring), measuring)
    found = Quantize.fit(
        network,
        fitting,
        bits=bits,
        bytes=bytes,
        methods=methods,
        where=Quantize.as_mlx(network),
        result="logits",
        folder=out / "unfinished",
    )
    after = _perplexity(compile(network, measuring, quantize=found), measuring)
    if found.folded:
        network.load_weights(scaled_weights(from_mlx(network, measuring), found), strict=False)
    config["quantization"] = config["quantization_config"] = _BASE | pack(network, found)
    utils.save(out, model, network, tokenizer, config)
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    return Packed(out, found, before, after)


def pack(model: Any, config: Quantize) -> dict[str, dict[str, Any]]:
    """Turn the layers of a model into packed ones with the numbers of a fit.

    Args:
        model: it is changed.
        config: as `Quantize.fit` gave it for this model.

    Returns:
        The settings of each layer that was packed, by its path: what mlx-lm keeps under
        `quantization`.
    """
    chosen: dict[str, dict[str, Any]] = {}

    def settings(path: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        answer = config.answer(f"{path}.weight", module.weight.shape)
        if answer is None:
            return False
        chosen[path] = answer.settings
        return chosen[path]

    nn.quantize(model, class_predicate=settings)  # type: ignore[attr-defined]
    layers = dict(model.named_modules())
    for name, fitted in (config.fitted or {}).items():
        layer = layers[name.removesuffix(".weight")]
        layer.weight, layer.scales = fitted.weight, fitted.scales
        if fitted.biases is not None:
            layer.biases = fitted.biases
    return chosen


def scaled_weights(graph: Graph, config: Quantize) -> list[tuple[str, mx.array]]:
    """The weights that a fit scaled and found no numbers for, such as those of norms, by name."""
    folded = FoldScales(config.folded or {})(EliminateDeadCode()(graph))
    before = {node.args["name"]: node for node in graph.constants()}
    return [
        (name, node.args["data"].array)
        for node in folded.constants()
        if (name := node.args["name"])
        and node is not before[name]
        and name not in (config.fitted or {})
    ]


def _pieces(tokenizer: Any, path: Path, length: int, most: int) -> list[mx.array]:
    """Equally long pieces of a text, spread over it; at least two."""
    tokens = tokenizer.encode(path.read_text())
    count = min(len(tokens) // length, most)
    if count < 2:
        raise InputError(
            f"{path} has {len(tokens)} tokens, which make {count} pieces of {length}",
            hint="give more text, or a shorter length",
            origin=NOWHERE,
        )
    step = len(tokens) // count
    starts = [i * step for i in range(count)]
    return [mx.array([tokens[start : start + length]], mx.int32) for start in starts]


def _perplexity(program: Any, tokens: mx.array) -> float:
    logits = program(tokens)[0, :-1].astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, tokens[0, 1:])
    return math.exp(float(losses.mean()))
