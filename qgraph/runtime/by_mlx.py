"""A graph by MLX's own ops alone: what MLX can transform, and what a file of its own can hold.

Kernels that call a library of the host wait for their arrays, and MLX knows no gradient of kernels
written for CUDA.  Where `mx.grad`, `vjp`, `jvp`, `vmap`, `compile`, `checkpoint` or
`export_function` call a program, its graph runs node by node without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cache

import mlx.core as mx

from ..errors import UnsupportedError
from ..ir.graph import Graph, Node, Value
from ..ir.loops import CONTROL_FLOW, REGION
from ..kernels import kernel
from ..kernels.attention.form import only_mlx
from ..kernels.matmul.formats import address
from ..kernels.streams import Streams, as_device
from ..kernels.tracers import Tracers, is_shapeless
from ..rewrite.regions import inlined
from ..rewrite.rewriter import rewrite_each
from .interpret import Env, Interpreter, unrolls

_CUDA = frozenset({"decode_attention", "cached_attention", "tail_attention", "merge_tail"})
"""Ops that on a GPU are kernels of our own."""

_CHOSEN = frozenset({"decode_attention", "packed_matmul", "packed_gather", "packed_rows"})
"""Ops whose kernel was chosen."""

Take = Callable[[list[mx.array]], list[mx.array]]


class OneStream(Streams):
    """Streams of a program's own do not live on in a file: all runs on the device's."""

    def resolve(self, stream: object) -> object:
        return None if stream is None or isinstance(stream, int) else as_device(stream)


def by_mlx(graph: Graph) -> Graph:
    """The graph without regions, and with MLX's own kernel wherever one reads the weight as it is
    packed."""
    return rewrite_each(inlined(graph), _own, "by-mlx", _CHOSEN)


def _own(node: Node) -> Sequence[Value] | None:
    if node.stage != "run":
        return None
    if node.op == "decode_attention":
        on_host = node.args.get("cores")
        return node.replace(args={**node.args, "cores": 0}, kernel="").outputs if on_host else None
    name = kernel(node.args["kernel"]).mlx_form
    if name == node.args["kernel"]:
        return None
    return node.replace(args={**node.args, "kernel": name}, kernel=name).outputs


def run_by_mlx(
    graph: Graph, known: Mapping[Value, mx.array], device: mx.Device, arrays: Sequence[mx.array]
) -> list[mx.array]:
    """The results of what runs at each call, node by node; nothing is evaluated on the way.

    Args:
        graph: made by `by_mlx`.
        known: packed weights and constants.
        arrays: for the inputs of the graph.

    Raises:
        UnsupportedError: a loop or a branch asks for elements that MLX does not have yet, or the
            call is traced for all shapes.
    """
    refuse_shapeless()
    env: Env = {**known, **dict(zip(graph.inputs, arrays, strict=True))}
    interpreter = Interpreter(OneStream(device))
    token = only_mlx.set(True)
    try:
        for node in graph.nodes:
            if node.stage == "run" and not _is_there(node, env):
                _run(interpreter, node, env)
    finally:
        only_mlx.reset(token)
    return [env[v] for v in graph.outputs]


def refuse_shapeless() -> None:
    """Called when a program's nodes are traced: they were made for the shapes of its arguments.

    Raises:
        UnsupportedError: by `mx.compile` or `mx.export_function` with `shapeless=True`.
    """
    if is_shapeless():
        raise UnsupportedError(
            "a program is made for the shapes it was compiled for, and shapeless=True would run it "
            "for others",
            hint="leave out shapeless=True; qg.jit compiles for the shapes it meets",
        )


def _is_there(node: Node, env: Env) -> bool:
    """Is it a constant that is known, or that only the pack step read?  Regions have their own."""
    return node.op == "constant" and (node.output in env or node.args["data"].is_released)


def _run(interpreter: Interpreter, node: Node, env: Env) -> None:
    try:
        interpreter.run(node, env)
    except ValueError as error:
        if node.op not in CONTROL_FLOW or "[eval]" not in str(error):
            raise
        raise UnsupportedError(
            f"{node.op} needs to know how it goes on, which vmap and compile do not say",
            hint="call the program outside of them, or write it with qg.where and a fixed number "
            "of turns",
            origin=node.origin,
        ) from None


def transformable(
    take: Take, graph: Graph, known: Mapping[Value, mx.array], device: mx.Device
) -> Take:
    """`take`, which runs the graph as it was lowered, and for tracers the graph by MLX's ops."""

    @cache
    def forms() -> tuple[Graph, list[Value]]:  # with the first tracers: most programs meet none
        return by_mlx(graph), strided(known)

    if not any(_asks_for_care(node, device) for _, node in graph.walk()):
        own, views = forms()
        if own is graph and not views:
            return take
    tracers = Tracers()

    def run(arrays: list[mx.array]) -> list[mx.array]:
        if not tracers.among(arrays):
            return take(arrays)
        own, views = forms()
        # What `mx.export_function` writes of a view are other elements of its buffer.
        whole = {value: mx.contiguous(known[value]) for value in views}
        mx.eval(list(whole.values()))
        taken = set(map(id, arrays))
        results = run_by_mlx(own, {**known, **whole}, device, arrays)
        return [copy(array) if id(array) in taken else array for array in results]

    return run


def strided(known: Mapping[Value, mx.array]) -> list[Value]:
    """Whose elements do not lie one after the other: transposed, sliced or broadcast ones.

    >>> import mlx.core as mx, qgraph as qg
    >>> w = mx.ones((2, 3))
    >>> a, b = qg.tensor(w).value, qg.tensor(w.T).value
    >>> strided({a: w, b: w.T}) == [b]
    True
    """
    many = {value: array for value, array in known.items() if array.ndim and array.size > 1}
    whole = {value: mx.contiguous(array) for value, array in many.items()}
    mx.eval(list(whole.values()), list(many.values()))
    return [v for v, array in many.items() if address(array) != address(whole[v])]


def _asks_for_care(node: Node, device: mx.Device) -> bool:
    """Is it driven from the host, on a stream of its own, or by a kernel written for CUDA?"""
    return (
        node.op == REGION
        or (node.op in CONTROL_FLOW and not unrolls(node))
        or (isinstance(node.stream, int) and node.stream > 0)
        or (node.op in _CUDA and device.type == mx.gpu)
    )
