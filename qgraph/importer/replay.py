"""Doing what was captured again, in ops of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import QGraphError, UnsupportedError
from ..origin import Origin, stated, user_frame
from ..quantization.calls import dequantize, quantize
from ..tracing.constants import constant_for
from ..tracing.functions import FUNCTIONS
from ..tracing.tensor import Tensor, as_tensor
from ..types import TensorType
from .capture import Capture, Primitive
from .primitives import PRIMITIVES
from .ways import way_round

_WITH_SETTINGS: dict[str, Callable[..., Any]] = {"quantize": quantize, "dequantize": dequantize}
"""These fill in the group size and bits that a call left to the mode: passes read them."""


def replay(capture: Capture, inputs: Sequence[Tensor], fn: str) -> list[Any]:
    """Nodes for what was captured, the function's inputs being `inputs`; gives its outputs.

    Raises:
        UnsupportedError: a primitive has no entry in the table, or no op says what it does.
    """
    weights = capture.weights
    paths = dict(zip(capture.inputs, weights, strict=False))
    env: dict[str, Any] = dict(zip(capture.inputs[len(paths) :], inputs, strict=True))
    outside = user_frame()
    origins = _origins(capture, paths)
    token = stated.set(outside)
    try:
        for key, path in paths.items():
            stated.set(Origin(label=path))
            env[key] = Tensor(constant_for(weights[path], path))
        for key, array in capture.constants.items():
            stated.set(origins.get(key, outside))
            env[key] = as_tensor(array)
        for key, (name, array) in capture.captured.items():
            stated.set(Origin(label=name))
            env[key] = Tensor(constant_for(array, name))
        made: dict[Any, list[str]] = {}
        first: dict[str, str] = {}
        for primitive in _needed(capture, env):
            # MLX merges what is computed twice, but not where both were asked for, as notes do.
            keys = [key for key, _, _ in primitive["outputs"]]
            twins = made.setdefault(_signature(primitive, first), keys)
            if twins is keys:
                stated.set(origins.get(keys[0], outside))
                env.update(zip(keys, _make(primitive, env, capture, fn), strict=True))
            else:
                first.update(zip(keys, twins, strict=True))
                env.update((key, env[twin]) for key, twin in zip(keys, twins, strict=True))
        return [env[key] for key in capture.outputs]
    finally:
        stated.reset(token)


def _needed(capture: Capture, known: Mapping[str, Any]) -> list[Primitive]:
    """The primitives that the outputs need, in the order of the program.

    MLX hands them over in an order in which one may come before what it reads, where it merged
    primitives of several outputs.
    """
    makers = {key: p for p in capture.primitives for key, _, _ in p["outputs"]}
    wanted = set(capture.outputs)
    found = []
    for primitive in reversed(_after_inputs(capture.primitives, makers)):
        keys = {key for key, _, _ in primitive["outputs"]}
        if keys & wanted and not keys <= known.keys():
            found.append(primitive)
            wanted.update(key for key, _, _ in primitive["inputs"])
    return found[::-1]


def _after_inputs(
    primitives: Sequence[Primitive], makers: Mapping[str, Primitive]
) -> list[Primitive]:
    done: set[int] = set()
    found = []
    for first in primitives:
        pending = [first]
        while pending:
            primitive = pending[-1]
            before = [
                maker
                for key, _, _ in primitive["inputs"]
                if (maker := makers.get(key)) is not None and id(maker) not in done
            ]
            if before:
                pending += before
                continue
            pending.pop()
            if id(primitive) not in done:
                done.add(id(primitive))
                found.append(primitive)
    return found


def _signature(primitive: Primitive, first: Mapping[str, str]) -> tuple[Any, ...]:
    inputs = [first.get(key, key) for key, _, _ in primitive["inputs"]]
    types = [(shape, str(dtype)) for _, shape, dtype in primitive["outputs"]]
    return primitive["name"], repr(primitive["arguments"]), *inputs, repr(types)


def _origins(capture: Capture, paths: Mapping[str, str]) -> dict[str, Origin]:
    """Where each array was made.

    What MLX made by itself on the way to something comes from that; what nobody noted comes from
    the weight it reads.
    """
    origins = dict(capture.origins)
    for primitive in reversed(capture.primitives):
        keys = [key for key, _, _ in primitive["outputs"]]
        inputs = [key for key, _, _ in primitive["inputs"]]
        found = next((origins[key] for key in keys if key in origins), None)
        if found is None:
            path = next((paths[key] for key in inputs if key in paths), None)
            found = Origin(label=path.rpartition(".")[0] or path) if path else None
        if found is not None:
            for key in keys:
                origins.setdefault(key, found)
            for key in inputs:
                if key not in capture.origins and key not in paths:
                    origins[key] = found
    return origins


def _make(primitive: Primitive, env: Mapping[str, Any], capture: Capture, fn: str) -> Sequence[Any]:
    """The tensors that the primitive gives."""
    name = primitive["name"]
    inputs = [env[key] for key, _, _ in primitive["inputs"]]
    types = [TensorType(tuple(shape), dtype) for _, shape, dtype in primitive["outputs"]]
    try:
        if name == "CustomKernel" and (call := capture.marker(primitive)) is not None:
            args, kwargs = call.arguments(inputs)
            function = _WITH_SETTINGS.get(call.op, FUNCTIONS[call.op])
            result = function(*args, **kwargs, stream=call.stream)
        elif name == "CustomKernel":
            raise NotImplementedError(f"{primitive['arguments'][0]} is a kernel of its own")
        elif name in PRIMITIVES:
            result = PRIMITIVES[name](inputs, primitive["arguments"], types)
        else:
            raise NotImplementedError("it has no entry in the table of primitives")
    except UnsupportedError:
        raise
    except (NotImplementedError, QGraphError) as error:
        words = error.what if isinstance(error, QGraphError) else str(error)
        raise UnsupportedError(
            f"from_mlx: {fn} uses the primitive {name}: {words}", hint=way_round(name)
        ) from None
    outputs = result if isinstance(result, list | tuple) else [result]
    for tensor, stated_type in zip(outputs, types, strict=True):
        if tensor.value.type != stated_type:
            raise UnsupportedError(
                f"from_mlx: {fn}: {name} gave {tensor.value.type}, MLX says {stated_type}",
                hint="this is a fault of qgraph's table of primitives; please report it",
            )
    return outputs
