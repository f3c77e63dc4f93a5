"""Stretches of a graph that one native call can carry out become regions.

On CPUs a graph used to be many calls: compiled stretches of MLX and products from the host, each
waiting for the one before.  A region is one call: its body says what it computes, the back end of
`qgraph/runtime/regions` how.

Rewrites:
    1. nodes that the back end knows, and that wait for nothing it does not know, become one
       `region`; those that wait for others become the next, and so on.  Weights and whatever else
       comes from outside are operands, numbers stay numbers.
    2. a loop or branch whose bodies it knows as well is part of a region as a whole; of others the
       bodies get regions of their own.
Leaves alone:
    1. what the pack and prepare steps compute.
    2. what it does not know; the ledger names it where a region ends.
    3. stretches so small that a call would cost more than it gives.
    4. nodes with a stream of their own.
    5. other targets, and machines on which the engine cannot be built.
    6. the part of a value that a rank takes, and loops with one: which it is, is known later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from qgraph.analysis.estimate import estimate
from qgraph.analysis.meshes.ops import is_part
from qgraph.ir.graph import Graph, Node, Value, input_value, is_constant, is_scalar
from qgraph.ir.kinds import PRODUCTS
from qgraph.ir.loops import REGION, turns
from qgraph.ir.ops import OPS
from qgraph.rewrite.ledger import Entry, collecting, record
from qgraph.rewrite.rewriter import with_bodies
from qgraph.target import Target

from .eliminate_dead_code import EliminateDeadCode
from .hoist_quantize import HoistQuantize
from .stored_scales import forms_regions

_NAME = "form-regions"
CALL_US = 40.0
"""What a region must save at least, microseconds: a call binds its inputs and results."""


@dataclass(frozen=True)
class FormRegions:
    """See the module.  `everywhere` forms regions however little they save."""

    target: Target | None = None
    everywhere: bool = False
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        if not forms_regions(self.target):
            return graph
        from qgraph.runtime.regions.cpu.known import refusal  # 40 ms, when regions are formed

        with collecting() as entries:
            moved = EliminateDeadCode()(HoistQuantize()(graph))
            made = formed(moved, refusal, self._pays, _NAME)
        if made is moved:  # what was moved for nothing is not told either
            return graph
        for entry in entries:
            record(entry)
        return made

    def _pays(self, _: Graph, nodes: Sequence[Node]) -> bool:
        return self.everywhere or _saves(nodes) >= CALL_US


@dataclass(frozen=True)
class _Stretch:
    """Nodes of one turn.

    Attributes:
        nodes: in order.
        ends: the node that follows and has no place in a region, with the reason.
    """

    nodes: list[Node]
    ends: tuple[Node, str] | None


def formed(
    graph: Graph,
    refusal: Callable[[Node], str | None],
    pays: Callable[[Graph, Sequence[Node]], bool],
    name: str,
    kernel: str = "",
    opens: Callable[[Node], bool] = lambda _: False,
) -> Graph:
    """The graph with its regions.

    Args:
        refusal: why the back end cannot hold a node; None if it can.
        pays: is a stretch of nodes worth a region?
        name: of the pass.
        kernel: of the regions' nodes.
        opens: is a node one that a region begins with, where it waits for another region?
    """

    def inside(body: Graph) -> Graph:
        return formed(body, refusal, pays, name, kernel, opens)

    why = {n: _of_a_rank(n) or refusal(n) for n in graph.nodes
           if n.op != "constant" and n.stage == "run"}  # fmt: skip
    turns = _turns(graph, why, opens)
    stretches = [nodes for i, nodes in sorted(turns.items()) if i % 2 == 0]
    chosen = [nodes for nodes in stretches if pays(graph, nodes)]
    inner = any(n.bodies and why.get(n) is not None for n in graph.nodes)
    if not chosen and not inner:
        return graph
    replace: dict[Value, Value] = {}
    done: list[Node] = [n for n in graph.nodes if n not in why]
    changed = False
    for turn, nodes in sorted(turns.items()):
        if any(nodes is each for each in chosen):
            after = next((n for n in turns.get(turn + 1, ()) if why[n] is not None), None)
            next_one = next((n for n in turns.get(turn + 2, ()) if opens(n)), None)
            region = region_of(graph, nodes, replace, name, kernel)
            ends = None if next_one is None else (next_one, "a region begins with it")
            _report(nodes, ends if after is None else (after, why[after] or ""), name)
            done.append(region)
            changed = True
            continue
        for node in nodes:
            new = node.with_inputs(replace)
            if why[node] is not None:
                new = with_bodies(new, inside)
            changed = changed or new is not node
            done.append(new)
            replace.update(
                (a, b) for a, b in zip(node.outputs, new.outputs, strict=True) if a is not b
            )
    if not changed:
        return graph
    return graph.replace(nodes=done, outputs=[replace.get(v, v) for v in graph.outputs])


def _turns(
    graph: Graph, why: dict[Node, str | None], opens: Callable[[Node], bool]
) -> dict[int, list[Node]]:
    """Nodes by turn, each in the first that it can have: the even ones make regions."""
    at: dict[Value, int] = {}
    turns: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node not in why:
            continue
        odd = int(why[node] is not None)
        before = [at[v] for v in node.inputs if v in at]
        turn = max((t + (t % 2 != odd) for t in before), default=odd)
        if not odd and turn in before and opens(node):
            turn += 2
        at.update(dict.fromkeys(node.outputs, turn))
        turns.setdefault(turn, []).append(node)
    return turns


def _of_a_rank(node: Node) -> str | None:
    inside = (inner for body in node.bodies for _, inner in body.walk())
    return "each rank takes another part" if any(map(is_part, (node, *inside))) else None


def region_of(
    graph: Graph, nodes: Sequence[Node], replace: dict[Value, Value], name: str, kernel: str = ""
) -> Node:
    """A region of nodes; what they gave is then what it gives."""
    made = {v for node in nodes for v in node.outputs}
    inside: dict[Value, Value] = {}
    outside: list[Value] = []
    body: list[Node] = []
    numbers: dict[Value, Value] = {}

    def enter(value: Value) -> Value:
        if value in inside or value in numbers:
            return inside.get(value) or numbers[value]
        if is_scalar(value):
            copy = value.node.replace()
            body.append(copy)
            numbers[value] = copy.output
            return copy.output
        called = "" if is_constant(value) else str(value.node.args.get("name", "") or "")
        inside[value] = input_value(value.type, called)
        outside.append(replace.get(value, value))
        return inside[value]

    for node in nodes:
        new = node.with_inputs({v: enter(v) for v in node.inputs})
        if "cores" in new.args:  # the host's kernel for attention: the body is for any machine
            new = new.replace(args={**new.args, "cores": 0}, kernel="")
        body.append(new)
        inside.update(zip(node.outputs, new.outputs, strict=True))
    read = set(graph.outputs)
    members = set(nodes)
    read.update(v for node in graph.nodes if node not in members for v in node.inputs)
    results = [v for node in nodes for v in node.outputs if v in read and v in made]
    inputs = [inside[v] for v in inside if inside[v].node.op == "input"]
    graph_inside = Graph("region", inputs, body, [inside[v] for v in results])
    origin = nodes[0].origin.by(name)
    region = Node(
        REGION, {"carried": (), "invariants": tuple(outside)}, [v.type for v in results],
        bodies=[graph_inside], origin=origin, kernel=kernel,
    )  # fmt: skip
    replace.update(zip(results, region.outputs, strict=True))
    return region


def _saves(nodes: Sequence[Node]) -> float:
    """Microseconds that the engine saves over MLX's own operations, roughly.

    Measured on two AVX-512 cores: MLX does 4 GFLOP a second of products, a function such as `tanh`
    takes it 10 ns an element, and a norm or softmax 5.  Plain arithmetic is bound by memory, and so
    are reductions, of which two threads do more; `python -m benchmarks.regions` measures each kind.
    """
    return sum(map(_saved_us, nodes))


def _is_view(node: Node) -> bool:
    from qgraph.runtime.regions.cpu.views import VIEWS  # as above

    return node.op in VIEWS


def _saved_us(node: Node) -> float:
    if node.bodies:
        inner = (n for body in node.bodies for n in body.nodes)
        return (turns(node) or 1) * sum(map(_saved_us, inner))
    if node.op == "constant" or not node.inputs or _is_view(node):
        return 0.0
    kind, size = OPS[node.op].kind, node.inputs[0].type.size
    if node.op in PRODUCTS or node.op in _ATTENTION or kind == "convolution":
        return 1.0 + estimate(node).flops / 4e3
    if node.op in _ROWS:
        return 1.0 + 0.005 * size
    if kind == "reduction" and mx.issubdtype(node.inputs[0].dtype, mx.floating):
        return 0.5 + (0.0002 if _reduces_last(node) else -0.0002) * size
    if kind in ("reduction", "cumulative"):
        return 0.5 - 0.001 * size
    if kind == "elementwise" and any(v.node.op in _TURNING for v in node.inputs):
        return -0.002 * node.output.type.size
    if node.op in _FUNCTIONS:
        return 0.5 + 0.01 * node.output.type.size
    return 0.5 - 0.0005 * node.output.type.size


_ATTENTION = frozenset({"fast.scaled_dot_product_attention", "decode_attention"})
_ROWS = frozenset({"fast.rms_norm", "fast.layer_norm", "fast.rope", "softmax", "logsumexp"})
_FUNCTIONS = frozenset(
    {"exp", "expm1", "log", "log1p", "log2", "log10", "sigmoid", "tanh", "erf", "erfinv", "sin",
     "cos", "tan", "sinh", "cosh", "power", "logaddexp", "arctan2"}
)  # fmt: skip
_TURNING = frozenset({"transpose", "matrix_transpose", "swapaxes", "moveaxis"})


def _reduces_last(node: Node) -> bool:
    axes = node.args.get("axis")  # None, and of `allclose`, which has none, means all
    last = node.inputs[0].ndim - 1
    return axes is None or last in [
        axis % (last + 1) for axis in (axes if isinstance(axes, tuple) else (axes,))
    ]


def _report(nodes: Sequence[Node], ends: tuple[Node, str] | None, name: str) -> None:
    count = sum(1 for node in nodes if not _is_view(node))
    why = "it goes on to the end" if ends is None else f"it ends before {ends[0].op}: {ends[1]}"
    about = f"of {count} nodes"
    record(Entry(name, "fused", REGION, nodes[0].origin, why, about=about))
