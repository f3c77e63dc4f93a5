"""Programs as `.mlxfn` files, which MLX runs by itself from Python, C++ or Swift."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import QGraphError
from ..ir.graph import Graph, Node, Value, constant_value
from ..ir.loops import CONTROL_FLOW
from ..kernels.chosen import runs_on_host
from ..rewrite.contracts import coarsest, difference
from ..rewrite.rewriter import rewrite_each
from .by_mlx import by_mlx, run_by_mlx
from .executable import Executable
from .interpret import unrolls


def export(executable: Executable, path: str | Path) -> Path:
    """Write what runs at each call, the packed weights with it; see `Program.export`."""
    place = Path(path)
    if place.suffix != ".mlxfn":
        raise QGraphError(f"{place.name} does not end in .mlxfn", hint="as mx.import_function asks")
    graph = by_mlx(rewrite_each(executable.body, _contiguous, "export"))
    for node in _run_nodes(graph):
        if reason := _why_not(node):
            why, hint = reason
            raise QGraphError(f"{node.op} cannot be exported: {why}", hint=hint, origin=node.origin)
    known = {value: mx.contiguous(array) for value, array in executable.known.items()}

    def call(*arrays: mx.array) -> list[mx.array]:
        return run_by_mlx(graph, known, executable.target.device, arrays)

    examples = _examples(graph)
    # Under another name until it is known to be right: what was there before stays till then.
    draft = place.with_name(f"{place.stem}.{os.getpid()}.mlxfn")
    with executable.on_device():
        mx.eval(list(known.values()))
        try:
            mx.export_function(str(draft), call, *examples)
            written: Any = mx.import_function(str(draft))
            _check(graph, call(*examples), written(*examples))
            draft.replace(place)
        except QGraphError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            raise QGraphError(
                f"MLX cannot export {graph.name}: {error}",
                hint="program.save writes a folder that qg.load reads",
            ) from None
        finally:
            draft.unlink(missing_ok=True)
    return place


def _contiguous(node: Node) -> Sequence[Value] | None:
    """MLX writes an array's buffer without its strides: a view comes back as other elements."""
    if node.op != "constant" or node.output.ndim == 0 or node.args["data"].is_released:
        return None
    array = mx.contiguous(node.args["data"].array)
    mx.eval(array)
    return [constant_value(array, node.args["name"], node.origin)]


def _examples(graph: Graph) -> list[mx.array]:
    """Arrays to try the file on: of floats some numbers, of integers what divides and indexes."""
    ops = {node.op for _, node in graph.walk()}
    integer = int(bool(ops & {"floor_divide", "remainder", "divmod"}))
    keys = mx.random.split(mx.random.key(0), max(1, len(graph.inputs)))
    return [
        mx.random.normal(v.shape, key=key).astype(v.dtype)
        if mx.issubdtype(v.dtype, mx.inexact)
        else mx.full(v.shape, integer, v.dtype)
        for v, key in zip(graph.inputs, keys, strict=False)
    ]


def _check(graph: Graph, wanted: Sequence[mx.array], found: Sequence[mx.array]) -> None:
    for old, new in zip(wanted, found, strict=True):
        old, new = _numbers(old), _numbers(new)
        if error := difference(old, new, "dtype-preserving", coarsest(graph)):
            raise QGraphError(
                f"the file that MLX wrote of {graph.name} computes something else: {error}",
                hint="program.save writes a folder that qg.load reads; please report this",
            )


def _numbers(x: mx.array) -> mx.array:
    return mx.nan_to_num(x) if mx.issubdtype(x.dtype, mx.floating) else x


def _run_nodes(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        if node.stage == "run":
            for body in node.bodies:
                yield from _run_nodes(body)
            yield node  # after what it holds, which may be why it cannot unroll


def _why_not(node: Node) -> tuple[str, str] | None:
    """Why a node has no place in a file, and what to do."""
    if runs_on_host(node.op, node.args):
        return (
            f"its kernel, {node.kernel or node.args['kernel']}, calls a library of the host",
            'leave the pass "choose-kernel" out: '
            'qg.compile(..., passes=[p for p in qg.default_passes() if p.name != "choose-kernel"])',
        )
    if node.op in CONTROL_FLOW and not unrolls(node):
        return (
            "it is driven from the host, turn by turn",
            "export the function of one turn, or a loop of fewer turns, which unrolls",
        )
    return None
