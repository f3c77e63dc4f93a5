"""Programs as `.mlxfn` files, which MLX runs by itself from Python, C++ or Swift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import QGraphError
from ..ir.graph import Graph, Node, Value
from ..ir.loops import CONTROL_FLOW
from ..kernels import kernel, plain
from ..kernels.chosen import runs_on_host
from ..kernels.streams import Streams, as_device
from ..rewrite.rewriter import rewrite_each
from .executable import Executable
from .interpret import Env, Interpreter, unrolls


class _OneStream(Streams):
    """Streams of a program do not live on in a file: all runs on the device's own."""

    def resolve(self, stream: Any) -> Any:
        return None if stream is None or isinstance(stream, int) else as_device(stream)


def export(executable: Executable, path: str | Path) -> Path:
    """Write what runs at each call, the packed weights with it; see `Program.export`."""
    place = Path(path)
    if place.suffix != ".mlxfn":
        raise QGraphError(f"{place.name} does not end in .mlxfn", hint="as mx.import_function asks")
    graph = rewrite_each(executable.graph, _by_mlx, "export")
    for node in _run_nodes(graph):
        if reason := _why_not(node):
            why, hint = reason
            raise QGraphError(f"{node.op} cannot be exported: {why}", hint=hint, origin=node.origin)
    weights = dict(executable.known)
    weights |= {
        n.output: n.args["data"].array for n in _constants(graph) if n.output not in weights
    }

    def call(*arrays: mx.array) -> list[mx.array]:
        env: Env = {**weights, **dict(zip(graph.inputs, arrays, strict=True))}
        interpreter = Interpreter(_OneStream(executable.streams.device))
        for node in graph.nodes:
            if node.stage == "run" and node.op != "constant":
                interpreter.run(node, env)
        return [env[v] for v in graph.outputs]

    examples = [mx.zeros(v.shape, v.dtype) for v in graph.inputs]
    with executable.on_device():
        try:
            mx.export_function(str(place), call, *examples)
        except (RuntimeError, ValueError) as error:
            raise QGraphError(
                f"MLX cannot export {graph.name}: {error}",
                hint="program.save writes a folder that qg.load reads",
            ) from None
    return place


def _by_mlx(node: Node) -> Sequence[Value] | None:
    """A file has no place for calls of a library: where the weight is packed as MLX packs it, its
    own kernel reads it as well."""
    if node.stage != "run" or not runs_on_host(node.op, node.args):
        return None
    if node.op == "decode_attention":
        return node.replace(args={**node.args, "cores": 0}, kernel="").outputs
    if kernel(node.args["kernel"]).layout:
        return None
    own = plain(node.args["problem"])
    return node.replace(args={**node.args, "kernel": own}, kernel=own).outputs


def _run_nodes(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        if node.stage == "run":
            for body in node.bodies:
                yield from _run_nodes(body)
            yield node  # after what it holds, which may be why it cannot unroll


def _constants(graph: Graph) -> Iterator[Node]:
    """Constants that a call reads: packing may have let the others go."""
    read = {v for n in graph.nodes if n.stage == "run" for v in n.inputs} | set(graph.outputs)
    return (n for n in graph.constants() if n.output in read)


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
