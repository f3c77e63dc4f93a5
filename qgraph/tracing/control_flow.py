"""Loops and branches as nodes, with JAX's names and argument order.

Given arrays alone, outside a trace, each runs at once in Python.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..errors import ControlFlowError
from ..ir.graph import Node, input_value
from ..ir.loops import turn_order
from ..origin import user_frame
from ..tree import Tree, flatten
from ..types import TensorType, as_int, type_of
from .carried import (
    carried_values,
    inputs_like,
    out_tree,
    own_arrays,
    tensors,
    with_same_results,
    with_stable_carry,
)
from .constants import trace_constants
from .tensor import Tensor, as_tensor, has_tensor
from .trace import next_serial, parameter_names, trace_body, tracing

I32 = TensorType((), mx.int32)


def _is_eager(*args: Any) -> bool:
    return trace_constants.get() is None and not has_tensor(args)


def _count(op: str, bound: Any) -> Any:
    if isinstance(bound, Tensor | mx.array):
        value = as_tensor(bound)
        if value.shape != () or not mx.issubdtype(value.dtype, mx.integer):
            raise ControlFlowError(
                f"{op}: a bound is {value.value.type}", hint="bounds are integers without axes"
            )
        return as_int(bound) if isinstance(bound, mx.array) else value.astype(mx.int32).value
    return _whole_number(op, bound)


def _whole_number(op: str, bound: Any) -> int:
    """A bound as an int; 2.5 turns are none."""
    if isinstance(bound, mx.array) and mx.issubdtype(bound.dtype, mx.integer):
        return as_int(bound)
    try:
        return operator.index(bound)
    except TypeError:
        raise ControlFlowError(
            f"{op}: a bound is {bound!r}", hint="bounds are integers without axes"
        ) from None


def _truth(op: str, pred: Any) -> bool:
    """A condition that is known now."""
    if isinstance(pred, mx.array) and (pred.ndim or pred.dtype != mx.bool_):
        raise ControlFlowError(
            f"{op}: the condition gives {type_of(pred)}",
            hint="give one bool without axes, such as qg.any(x > 0)",
        )
    return bool(pred)


def _loop_names(fn: Callable[..., Any], count: int) -> list[str]:
    return parameter_names(fn, [None] * count)


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[Any, Any], Any], init_val: Any) -> Any:
    """`for i in range(lower, upper): init_val = body_fun(i, init_val)`, as one node.

    Args:
        lower, upper: integers, or 0-d integer tensors known only at run time.
        body_fun: (i, carry) -> carry; i is an int32 tensor without axes.
        init_val: a tree; shapes and dtypes stay the same from turn to turn.

    Raises:
        ControlFlowError: a carried value changes type; names it and both types.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.fori_loop(0, 3, lambda i, x: x * 2, mx.array(1.0)).item()
    8.0
    """
    if _is_eager(lower, upper, init_val):
        for i in range(_whole_number("fori_loop", lower), _whole_number("fori_loop", upper)):
            init_val = body_fun(mx.array(i, mx.int32), own_arrays(init_val))
        return init_val
    with tracing():
        carried, form = carried_values("fori_loop", init_val)
        bounds = [_count("fori_loop", b) for b in (lower, upper)]
        start = next_serial()
        index_name, carry_name = _loop_names(body_fun, 2)
        index = input_value(I32, index_name)
        inputs = inputs_like(carried, form, carry_name)
        body, captured = trace_body(
            body_fun, (Tensor(index), tensors(form, inputs)), [index, *inputs], "body", start
        )
    body = with_stable_carry("fori_loop", form, carried, body, out_tree(body))
    node = Node(
        "fori_loop",
        {
            "lower": bounds[0],
            "upper": bounds[1],
            "carried": tuple(carried),
            "invariants": tuple(captured),
        },
        [v.type for v in carried],
        bodies=[body],
        origin=user_frame(),
    )
    return tensors(form, node.outputs)


def scan(
    f: Callable[[Any, Any], Any],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
) -> Any:
    """Carry a value over the first axis of `xs` and stack what each turn gives.

    Args:
        f: (carry, x) -> (carry, y).
        init: the first carry, a tree.
        xs: a tree of tensors with the same first axis, or None with `length`.
        length: number of turns, where xs is None.
        reverse: go from the last to the first; ys keep the order of xs.

    Returns:
        (carry, ys), as `jax.lax.scan`.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.scan(lambda c, x: (c + x, c), mx.array(0.0), mx.array([1.0, 2.0, 3.0]))
    (array(6, dtype=float32), array([0, 1, 3], dtype=float32))
    """
    leaves, xs_form = flatten(xs)
    lengths = {leaf.shape[0] if getattr(leaf, "ndim", 0) else None for leaf in leaves}
    if length is not None:
        lengths.add(length)
    if len(lengths) != 1 or None in lengths or (length is not None and length < 0):
        raise ControlFlowError(
            f"scan: first axes differ or are missing: {sorted(map(str, lengths))}",
            hint="all of xs share their first axis; without xs give length=",
        )
    count = int(lengths.pop() or 0)
    if _is_eager(init, xs):
        return _eager_scan(f, init, leaves, xs_form, count, reverse)
    with tracing():
        carried, form = carried_values("scan", init)
        stacked = [as_tensor(leaf).value for leaf in leaves]
        start = next_serial()
        carry_name, x_name = _loop_names(f, 2)
        inputs = inputs_like(carried, form, carry_name)
        slices = [
            input_value(TensorType(v.shape[1:], v.dtype), path)
            for v, path in zip(stacked, xs_form.paths(x_name), strict=True)
        ]
        args = (tensors(form, inputs), tensors(xs_form, slices))
        body, captured = trace_body(f, args, [*inputs, *slices], "body", start)
    out = out_tree(body)
    if out.kind != "tuple" or len(out.children) != 2:
        raise ControlFlowError("scan: the body returns no pair", hint="return (carry, y)")
    body = with_stable_carry("scan", form, carried, body, out.children[0])
    ys = body.outputs[len(carried) :]
    node = Node(
        "scan",
        {
            "length": count,
            "reverse": bool(reverse),
            "carried": tuple(carried),
            "xs": tuple(stacked),
            "invariants": tuple(captured),
        },
        [*(v.type for v in carried), *(TensorType((count, *y.shape), y.dtype) for y in ys)],
        bodies=[body],
        origin=user_frame(),
    )
    split = len(carried)
    return tensors(form, node.outputs[:split]), tensors(out.children[1], node.outputs[split:])


def _eager_scan(
    f: Callable[[Any, Any], Any],
    carry: Any,
    leaves: list[Any],
    form: Tree,
    count: int,
    reverse: bool,
) -> Any:
    collected: list[list[Any]] = []
    if not count:  # a turn that nothing reads tells what ys would be
        _, y = f(own_arrays(carry), form.build([mx.zeros(x.shape[1:], x.dtype) for x in leaves]))
        parts, ys_form = flatten(y)
        types = [as_tensor(part).value.type for part in parts]
        return carry, ys_form.build([mx.zeros((0, *t.shape), t.dtype) for t in types])
    for i in turn_order(count, reverse):
        carry, y = f(own_arrays(carry), form.build([leaf[i] for leaf in leaves]))
        parts, ys_form = flatten(y)
        collected.append([mx.array(part) for part in parts])
    if reverse:
        collected.reverse()
    return carry, ys_form.build([mx.stack(list(part)) for part in zip(*collected, strict=True)])


def while_loop(
    cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], init_val: Any
) -> Any:
    """`while cond_fun(init_val): init_val = body_fun(init_val)`, as one node.

    Args:
        cond_fun: carry -> a bool tensor without axes.
        body_fun: carry -> carry, of the same types.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.while_loop(lambda x: x < 100, lambda x: x * 2, mx.array(3)).item()
    192
    """
    if _is_eager(init_val):
        while _truth("while_loop", cond_fun(own_arrays(init_val))):
            init_val = body_fun(own_arrays(init_val))
        return init_val
    with tracing():
        carried, form = carried_values("while_loop", init_val)
        start = next_serial()
        inputs = inputs_like(carried, form, _loop_names(cond_fun, 1)[0])
        test, test_captured = trace_body(cond_fun, (tensors(form, inputs),), inputs, "cond", start)
        start = next_serial()
        inputs = inputs_like(carried, form, _loop_names(body_fun, 1)[0])
        body, captured = trace_body(body_fun, (tensors(form, inputs),), inputs, "body", start)
    if [v.type for v in test.outputs] != [TensorType((), mx.bool_)]:
        raise ControlFlowError(
            f"while_loop: the condition gives {[str(v.type) for v in test.outputs]}",
            hint="return one bool tensor without axes, such as qg.any(x > 0)",
        )
    body = with_stable_carry("while_loop", form, carried, body, out_tree(body))
    node = Node(
        "while_loop",
        {
            "carried": tuple(carried),
            "cond_invariants": tuple(test_captured),
            "invariants": tuple(captured),
        },
        [v.type for v in carried],
        bodies=[test, body],
        origin=user_frame(),
    )
    return tensors(form, node.outputs)


def cond(
    pred: Any, true_fun: Callable[..., Any], false_fun: Callable[..., Any], *operands: Any
) -> Any:
    """`true_fun(*operands) if pred else false_fun(*operands)`; only one of them runs.

    Args:
        pred: a bool tensor without axes.
        true_fun, false_fun: return trees of the same form and types.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.cond(mx.array(True), lambda x: x + 1, lambda x: x - 1, mx.array(1)).item()
    2
    """
    if _is_eager(pred, operands):
        return (true_fun if _truth("cond", pred) else false_fun)(*own_arrays(operands))
    with tracing():
        test = as_tensor(pred)
        if test.shape != () or test.dtype != mx.bool_:
            raise ControlFlowError(
                f"cond: pred is {test.value.type}", hint="pred is one bool; use qg.any or x[0] > 0"
            )
        values, form = carried_values("cond", operands)
        graphs, captured = [], []
        for name, branch in (("true", true_fun), ("false", false_fun)):
            start = next_serial()
            inputs = inputs_like(values, form, "x")
            graph, outer = trace_body(branch, tensors(form, inputs), inputs, name, start)
            graphs.append(graph)
            captured.append(tuple(outer))
    graphs[1] = with_same_results(graphs[0], graphs[1])
    node = Node(
        "cond",
        {
            "pred": test.value,
            "carried": tuple(values),
            "true_invariants": captured[0],
            "false_invariants": captured[1],
        },
        [v.type for v in graphs[0].outputs],
        bodies=graphs,
        origin=user_frame(),
    )
    return tensors(out_tree(graphs[0]), node.outputs)
