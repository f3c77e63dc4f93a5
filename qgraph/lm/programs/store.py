"""Plans and packed weights on disk, so that a second start optimizes and packs nothing.

A folder for each checkpoint, machine and version of the code; in it a file for each program's graph
and one for each packed weight.  What lies there is trusted no further than what is made anew: a
program that was read is compared with the model at its first use like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import platformdirs
from mlx.utils import tree_flatten

from ...inspection.serialize import from_json, to_json
from ...ir.graph import Graph, Node, Value, map_values
from ...runtime import safetensors
from ...runtime.packing import PackCache, Staged, whole
from ...tracing.constants import constant_for
from ...tracing.trace import sharing
from ...types import type_of
from .form import Form

SAMPLES = 4096
"""Bytes of a weight, spread over all of it, by which a checkpoint is known."""


class Store:
    """The folder of one model.

    Args:
        model: whose weights the programs are of.
        settings: what else programs depend on, as text.
        root: the folder of folders; by default in the user's cache.
    """

    def __init__(self, model: Any, settings: str, root: Path | None = None) -> None:
        self._weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        mx.eval(list(self._weights.values()))  # another thread may be the first to read them
        self._model, self._settings = model, settings
        self._root = root or Path(platformdirs.user_cache_dir("qgraph")) / "lm"

    @cached_property
    def folder(self) -> Path:
        """Asked for when a program is made: what names it is read off all weights and sources."""
        return self._root / _fingerprint(self._model, self._weights, self._settings)

    def holds(self, form: Form) -> bool:
        """Is there a graph for a form, whole or not?"""
        return self._root.is_dir() and self._path(form).exists()

    def read(self, form: Form, packed: PackCache) -> Graph | None:
        """The optimized graph for a form, its packed weights in the cache; None if there is none.

        Raises nothing: what cannot be read is made again.
        """
        path = self._path(form)
        try:
            saved = json.loads(path.read_text())
            others = path.with_suffix(".safetensors")
            rest = safetensors.read(others) if saved["others"] else {}
            arrays = {key: self._weights[name] for key, name in saved["weights"].items()}
            arrays |= {key: rest[key] for key in saved["others"]}
            with sharing(packed.constants):
                graph = self._shared(from_json(saved["graph"], arrays))
            keys, names = packed.keys(graph), self._names(graph)
            for node in _kept(graph):
                if packed.get(keys[node]) is None:
                    found = safetensors.read(self._packed(names[node]))
                    arrays_of = [found[str(i)] for i in range(len(node.outputs))]
                    if [type_of(a) for a in arrays_of] != [v.type for v in node.outputs]:
                        return None
                    packed.put(keys[node], arrays_of)
            return graph
        except Exception:
            return None

    def write(self, form: Form, graph: Graph, packed: PackCache) -> None:
        """Keep a graph, and those of its packed weights that are not kept yet."""
        arrays: dict[str, mx.array] = {}
        text = to_json(graph, arrays)
        named = {key: key.partition(".")[2] for key in arrays}
        weights = {key: name for key, name in named.items() if self._is_weight(name, arrays[key])}
        others = {key: array for key, array in arrays.items() if key not in weights}
        path = self._path(form)
        try:
            keys, names = packed.keys(graph), self._names(graph)
            for node in _kept(graph):
                file, made = self._packed(names[node]), packed.get(keys[node])
                if made is not None and not file.exists():
                    _save(file, {str(i): array for i, array in enumerate(made)})
            if others:
                _save(path.with_suffix(".safetensors"), others)
            saved = {"graph": text, "weights": weights, "others": sorted(others)}
            with _written(path) as place:
                Path(place).write_text(json.dumps(saved))
        except OSError:
            return  # a disk that is full, or no folder to write to: the next start packs again

    def _path(self, form: Form) -> Path:
        return self.folder / f"{_digest(str(form.key()))}.json"

    def _packed(self, name: str) -> Path:
        return self.folder / "packed" / f"{name}.safetensors"

    def _is_weight(self, name: str, array: mx.array) -> bool:
        weight = self._weights.get(name)
        return weight is not None and type_of(weight) == type_of(array)

    def _shared(self, graph: Graph) -> Graph:
        """The graph over the constants that other programs of the model have."""
        replace: dict[Value, Value] = {}
        nodes = []
        for node in graph.nodes:
            new = node.with_inputs(replace)
            if node.op == "constant" and self._weights.get(node.args["name"]) is not None:
                new = constant_for(self._weights[node.args["name"]], node.args["name"]).node
            replace.update(zip(node.outputs, new.outputs, strict=True))
            nodes.append(new)
        return graph.replace(nodes=nodes, outputs=[replace.get(v, v) for v in graph.outputs])

    def _names(self, graph: Graph) -> dict[Node, str]:
        """A name for each packed node, of what it is computed from: the same in each start."""
        names: dict[Node, str] = {}

        def name(value: Value) -> str:
            return f"{names[value.node]}.{value.index}"

        for node in graph.nodes:
            if node.op == "constant":
                array = node.args["data"].array
                known = self._is_weight(node.args["name"], array)
                whole_of = "" if known else _digest(bytes(np.asarray(_some(array, array.nbytes))))
                names[node] = whole_of or node.args["name"]
            elif node.stage == "pack":
                args = [(key, map_values(arg, name)) for key, arg in sorted(node.args.items())]
                names[node] = _digest(f"{node.op} {args!r}")
        return names


def _kept(graph: Graph) -> list[Node]:
    """The nodes whose packed arrays are read when the program runs."""
    staged = Staged.of(graph, "pack")
    held = {v.node for v in staged.wanted} | {whole(v).node for v in staged.wanted}
    return [node for node in staged.nodes if node in held]


def _fingerprint(model: Any, weights: Mapping[str, mx.array], settings: str) -> str:
    """A name for model, weights, machine and code; of weights some bytes are read."""
    found = hashlib.sha256(f"{settings} {_code()} {type(model).__qualname__}".encode())
    for path, part in model.named_modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, int | float | str)}
        found.update(f"{path} {type(part).__qualname__} {sorted(plain.items())}".encode())
    samples = {name: _some(array, SAMPLES) for name, array in weights.items()}
    mx.eval(list(samples.values()))
    for name, array in weights.items():
        found.update(f"{name} {type_of(array)}".encode() + bytes(np.asarray(samples[name])))
    return found.hexdigest()[:32]


def _some(array: mx.array, count: int) -> mx.array:
    """So many of an array's bytes, from its beginning to its end."""
    flat = mx.contiguous(array).reshape(-1)
    if flat.dtype == mx.bool_:
        flat = flat.astype(mx.uint8)
    flat = flat.view(mx.uint8)
    return mx.contiguous(flat[:: max(1, flat.size // max(1, count))])


@cache
def _code() -> str:
    """Of the packages whose plans these are."""
    found = hashlib.sha256(f"mlx {version('mlx')} mlx-lm {version('mlx-lm')}".encode())
    root = Path(__file__).parents[2]
    for path in sorted(root.rglob("*.*")):
        if path.suffix in (".py", ".cpp", ".hpp", ".cuh", ".json"):
            found.update(path.read_bytes())
    return found.hexdigest()


def _digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:32]


class _written:
    """A file that is there whole or not at all, whoever else writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> str:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, self._place = tempfile.mkstemp(dir=self._path.parent, suffix=self._path.suffix)
        os.close(handle)
        return self._place

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            os.replace(self._place, self._path)
        else:
            os.unlink(self._place)


def _save(path: Path, arrays: dict[str, mx.array]) -> None:
    try:
        with _written(path) as place:
            mx.save_safetensors(place, {k: mx.contiguous(a) for k, a in arrays.items()})
    except RuntimeError as error:  # what MLX makes of a disk that is full
        raise OSError(str(error)) from None
