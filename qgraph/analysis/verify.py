"""Check everything that a graph promises."""

from __future__ import annotations

from typing import get_args

import mlx.core as mx

from ..errors import QGraphError, VerifyError
from ..ir.graph import Graph, Node, Stage, Value
from ..ir.loops import HOLDERS, REGION, invariant_names
from ..ir.ops import OPS
from ..tracing.nodes import infer
from ..types import TensorType, type_of
from .kernel_settings import MOST_CORES, wrong_setting


def verify(graph: Graph, checked: set[Node] | None = None) -> None:
    """Raise if `graph` breaks a promise of its form.

    Checked, in bodies too: every value is an input, or made by an earlier node of the same graph;
    no node stands twice; ops exist and their outputs have the types MLX infers; packed nodes
    depend on constants alone, prepared ones on parameters and constants; loop bodies are closed,
    take what the loop gives and return what it carries; constants have the type of their array;
    what a kernel of our own is told is what its operands are.

    Args:
        checked: nodes that passed before, to which those of this graph are added.  As nodes are
            immutable, only their places are looked at again: from pass to pass most stay.

    Raises:
        VerifyError: names the node, its origin and the promise.
    """
    known: dict[Value, str] = {}
    for value in graph.inputs:
        if value.node.op != "input":
            raise VerifyError(f"{graph.name}: an input is the result of {value.node.op}")
        known[value] = "prepare" if value.node.args["parameter"] else "run"
    seen: set[Node] = set()
    for node in graph.nodes:
        if node in seen:
            _fail(graph, node, "stands twice in the graph")
        seen.add(node)
        try:
            _check_place(graph, node, known)
            if checked is None or node not in checked:
                _check_node(graph, node, checked)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, QGraphError):
                raise
            _fail(graph, node, f"has other arguments than its op takes: {error!r}")
        if checked is not None:
            checked.add(node)
        known.update((value, node.stage) for value in node.outputs)
        if node.op == "constant":
            known[node.output] = "pack"
    for value in graph.outputs:
        if value not in known:
            _fail(graph, value.node, "is an output but not in the graph")


def _fail(graph: Graph, node: Node, what: str) -> None:
    made = f" (made by {node.origin.made_by})" if node.origin.made_by else ""
    raise VerifyError(f"{graph.name}: {node.op}{made} {what}", origin=node.origin)


_ORDER = {"pack": 0, "prepare": 1, "run": 2}
_CARRY = {"carried", "invariants"}
_ARGS = {
    "fori_loop": _CARRY | {"lower", "upper"},
    "scan": _CARRY | {"xs", "length", "reverse"},
    "while_loop": _CARRY | {"cond_invariants"},
    "cond": {"pred", "carried", "true_invariants", "false_invariants"},
    REGION: _CARRY,
}
_BOOL, _I32 = TensorType((), mx.bool_), TensorType((), mx.int32)


def _is_stream(stream: object) -> bool:
    if isinstance(stream, int):
        return type(stream) is int and 0 <= stream <= MOST_CORES  # each has a thread
    return not isinstance(stream, str) or stream in ("cpu", "gpu")


def _check_place(graph: Graph, node: Node, known: dict[Value, str]) -> None:
    """What a node reads, in this graph and at this point."""
    if node.stage not in _ORDER:
        _fail(graph, node, f"has stage {node.stage!r}, which is none of {get_args(Stage)}")
    for value in node.inputs:
        if value not in known:
            _fail(graph, node, f"reads {value!r}, which no earlier node of this graph makes")
        if _ORDER[known[value]] > _ORDER[node.stage]:
            _fail(graph, node, f"runs in the {node.stage} step but reads a value of {known[value]}")


def _check_node(graph: Graph, node: Node, checked: set[Node] | None) -> None:
    """What a node says of itself."""
    if not _is_stream(node.stream):
        _fail(graph, node, f"has stream {node.stream!r}")
    if node.op == "constant":
        data = node.args["data"]
        if not data.is_released and type_of(data.array) != node.output.type:
            _fail(graph, node, f"says it is {node.output.type}, its array is {type_of(data.array)}")
        return
    if node.op in HOLDERS:
        _check_bodies(graph, node)
        for body in node.bodies:
            verify(body, checked)
    elif node.op not in OPS:
        _fail(graph, node, "is not an op of the table")
    elif numbers := [n for n in OPS[node.op].scalar_operands if _is_number(node.args.get(n))]:
        _fail(graph, node, f"has a number for {numbers[0]}, which is a value of the graph")
    elif (wrong := wrong_setting(node)) is not None:
        _fail(graph, node, wrong)
    elif not node.inferred:
        inferred, _ = infer(OPS[node.op], node.args)
        stated = [value.type for value in node.outputs]
        if inferred != stated:
            _fail(graph, node, f"says it gives {stated}, MLX gives {inferred}")


def _is_number(arg: object) -> bool:
    return isinstance(arg, bool | int | float | complex)


def _types(values: tuple[Value, ...]) -> list[TensorType]:
    return [value.type for value in values]


def _check_bodies(graph: Graph, node: Node) -> None:
    names = invariant_names(node)
    if node.args.keys() != _ARGS[node.op]:
        _fail(graph, node, f"has {sorted(node.args)} instead of {sorted(_ARGS[node.op])}")
    if len(node.bodies) != len(names):
        _fail(graph, node, f"has {len(node.bodies)} bodies instead of {len(names)}")
    carried = _types(node.args["carried"])
    own = _own_inputs(graph, node, carried)
    for body, name in zip(node.bodies, names, strict=True):
        outer = _types(node.args[name])
        if _types(body.inputs) != own + outer:
            given = _types(body.inputs)
            _fail(graph, node, f"gives {body.name} {own + outer}, which takes {given}")
    gives = [_types(body.outputs) for body in node.bodies]
    if node.op == REGION and carried:
        _fail(graph, node, f"carries {carried}; a region takes all it needs as invariants")
    if node.op in ("cond", REGION):
        if any(types != _types(node.outputs) for types in gives):
            _fail(graph, node, f"gives {_types(node.outputs)}, its bodies give {gives}")
        return
    if node.op == "while_loop" and gives[0] != [_BOOL]:
        _fail(graph, node, f"is asked to go on by {gives[0]} instead of one bool")
    if gives[-1][: len(carried)] != carried:
        _fail(graph, node, f"carries {carried} but its body returns {gives[-1]}")
    stacked = gives[-1][len(carried) :]
    if node.op == "scan":
        stacked = [TensorType((node.args["length"], *t.shape), t.dtype) for t in stacked]
    elif stacked:
        _fail(graph, node, f"carries {carried} but its body returns {gives[-1]}")
    if _types(node.outputs) != carried + stacked:
        _fail(graph, node, f"gives {_types(node.outputs)}, its body {carried + stacked}")


def _own_inputs(graph: Graph, node: Node, carried: list[TensorType]) -> list[TensorType]:
    """The types of what each body takes before its invariants; checks where they come from."""
    if node.op == "cond":
        if node.operand("pred").type != _BOOL:
            _fail(graph, node, f"chooses by {node.operand('pred').type} instead of one bool")
    elif node.op == "fori_loop":
        for name in ("lower", "upper"):
            bound = node.args[name]
            if isinstance(bound, Value):
                fits = bound.type == _I32
            else:
                fits = type(bound) is int and -(2**31) <= bound < 2**31
            if not fits:
                _fail(graph, node, f"has {bound!r} for {name}, which is no int32")
        return [_I32, *carried]
    elif node.op == "scan":
        stacks, count = _types(node.args["xs"]), node.args["length"]
        if type(count) is not int or any(t.shape[:1] != (count,) for t in stacks):
            _fail(graph, node, f"makes {count!r} turns over {stacks}")
        if not isinstance(node.args["reverse"], bool):
            _fail(graph, node, f"has {node.args['reverse']!r} for reverse")
        return carried + [TensorType(t.shape[1:], t.dtype) for t in stacks]
    return carried
