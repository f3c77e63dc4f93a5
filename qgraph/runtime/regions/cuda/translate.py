"""A region's body, node by node, to the phases that carry it out."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx

from ....ir.graph import Graph, Node, Value, is_scalar
from ....kernels.base import HALF, Problem
from ..unknown import Unknown
from .attention import ARRAYS, OP, OUTPUTS, Attention, cut_of
from .experts import ByExpert, Experts
from .expressions import (
    FLOATS,
    Apply,
    Expression,
    Leaf,
    Normed,
    Number,
    Part,
    Routed,
    Summed,
    after,
    in_order,
    is_rowwise,
    phase_of,
)
from .held import SUM, check, rows_of
from .pick import MOST_BLOCKS, Pick, is_pick
from .stages import Phase, Row, Stages


def translate(body: Graph) -> Stages:
    """The phases of a body.

    Raises:
        Unknown: it is none that this back end knows; the message says why.
    """
    return _Translator(body).run()


class _Translator:
    def __init__(self, body: Graph) -> None:
        self.body = body
        products = [n for n in body.nodes if n.op == "packed_matmul"]
        if not products:
            raise Unknown("it has no product")
        self.rows = rows_of(products[0].output)
        self.phases: list[Phase | Attention | Pick] = []
        self.inputs: dict[Value, str] = {}
        self.arrays: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {}
        self.known: dict[Value, Expression] = {}
        self.stored: dict[Value, Leaf] = {}
        self.written: list[Row] = []
        self.picks: dict[Value, int] = {}
        self.parts: dict[Value, tuple[Value, int]] = {}
        self.within: dict[str, tuple[str, int]] = {}
        self.addends = 0
        self.experts = Experts(self)

    def run(self) -> Stages:
        for node in self.body.nodes:
            if node.op == "constant" or self._is_packing(node):
                continue
            if self.experts.has(node):
                self.experts.take(node)
                continue
            check(node, routing=node.op in ("packed_matmul", "split"))  # `_in_rows` sees to others
            if node.op == OP:
                self._attention(node)
                continue
            if is_pick(node):
                self._pick(node)
                continue
            for value in node.outputs:
                if rows_of(value) != self.rows:
                    raise Unknown(f"{rows_of(value)} rows beside {self.rows}")
            if node.op == "packed_matmul":
                self._product(node)
            elif node.op == "split":
                self._split(node)
            elif node.op == "reshape":
                self.known[node.output] = self._reshaped(node)
            elif node.op == SUM:
                self.known[node.output] = self._summed(node)
            elif node.op == "fast.rms_norm":
                self.known[node.output] = self._normed(node)
            else:
                self.known[node.output] = self._applied(node)
        results = [self._result(value) for value in self.body.outputs]
        return Stages(
            self.rows, self.inputs, self.phases, results, self.arrays, self.written,
            self.experts.routers, self.addends, self.within,
        )  # fmt: skip

    # ---- Values ---------------------------------------------------------------------------------

    def _is_packing(self, node: Node) -> bool:
        """Arrays that lie in one, taken apart or put together: no work, only addresses."""
        source = node.inputs[0]
        aligned = all(value.type.size % 8 == 0 for value in node.outputs)
        if node.op == "split" and source.node.op == "input" and source.ndim == 1 and aligned:
            start = 0
            for value in node.outputs:
                self.parts[value] = source, start
                start += value.type.size
        elif node.op == "reshape" and source in self.parts:
            self.parts[node.output] = self.parts[source]
        elif node.op == "reshape" and node.output.ndim == 1:
            users = self.body.users.get(node.output, ())
            return bool(users) and all(user.op == "concatenate" for user in users)
        else:
            return node.op == "concatenate"
        return True

    def _is_given(self, value: Value) -> bool:
        return value.node.op == "input" or value in self.parts

    def name(self, value: Value) -> str:
        if value not in self.parts:
            return self.inputs.setdefault(value, f"in{len(self.inputs)}")
        whole, start = self.parts[value]
        place = self.name(whole), start
        found = next((name for name, other in self.within.items() if other == place), None)
        name = found or f"part{len(self.within)}"
        self.within[name] = place
        return name

    def row(self, value: Value, like: Value) -> Expression:
        """An operand of an elementwise operation whose result is `like`."""
        if value in self.known:
            return self.known[value]
        if value in self.experts.routing.known:
            return self.experts.routing.number(value)
        if is_scalar(value):
            return Number(float(value.node.args["data"].array.item()))
        if not self._is_given(value):
            raise Unknown(f"an operand that is a {value.node.op}")
        columns = like.shape[-1]
        if value.ndim == 0 or value.shape[-1] != columns or value.dtype not in FLOATS:
            raise Unknown(f"{value.type} beside {like.type}")
        if rows_of(value) not in (1, self.rows):
            raise Unknown(f"{rows_of(value)} rows beside {self.rows}")
        made = Leaf(self.name(value), value.dtype, columns if rows_of(value) > 1 else 0)
        self.known[value] = made
        return made

    def readable(self, value: Value) -> Expression:
        """An expression of rows that can be computed from memory."""
        return _in_rows(self.in_memory(value), value)

    def in_memory(self, value: Value) -> Expression:
        """As `readable`, also of what is read number by number: products are written there."""
        e = self.row(value, value)
        return self._store(value) if phase_of(e) >= 0 else e

    def _store(self, value: Value) -> Leaf:
        """A value that comes of a product, written as the product is finished."""
        if value not in self.stored:
            phase = phase_of(self.known[value])
            self.experts.check_stored(value)
            name, columns = f"out{len(self.arrays)}", -(-value.shape[-1] // 8) * 8
            self.arrays[name] = (*value.shape[:-1], columns), value.dtype
            self.stored[value] = Leaf(name, value.dtype, columns, after=phase)
            self._product_of(phase).writes.append((self.stored[value], self.known[value]))
        return self.stored[value]

    def _product_of(self, phase: int) -> Phase:
        product = self.phases[phase]
        assert isinstance(product, Phase)
        return product

    def _result(self, value: Value) -> str:
        if self._is_given(value):
            raise Unknown("an input is a result as well")
        if value.node.op == "concatenate":
            return self._together(value)
        if value not in self.known:
            raise Unknown("a router's numbers are a result as well")
        e = self.known[value]
        if value.dtype in FLOATS:  # places are of one column
            _in_rows(e, value)
        if phase_of(e) >= 0:
            return self._store(value).name
        if isinstance(e, Leaf) and value in self.stored:
            return e.name
        name = f"out{len(self.arrays)}"
        self.arrays[name] = value.shape, value.dtype
        self.written.append(Row(name, value.dtype, value.shape[-1], e, after(e) + 1))
        return name

    def _together(self, value: Value) -> str:
        """Results that lie in one array."""
        name, start = f"out{len(self.arrays)}", 0
        self.arrays[name] = value.shape, value.dtype
        for flat in value.node.inputs:
            if flat.node.op != "reshape" or flat in self.parts:
                raise Unknown("results in one array that are none of this region's")
            part = self._result(flat.node.inputs[0])
            if part in self.within:
                raise Unknown("a result that lies in two arrays")
            self.within[part] = name, start
            start += flat.type.size
        return name

    # ---- Nodes ----------------------------------------------------------------------------------

    def _attention(self, node: Node) -> None:
        if self.phases or node.operand("keys").shape[0] != self.rows:
            raise Unknown("an attention that is not the first, or of other rows")
        given = {n: v for n in ARRAYS if (v := node.value(n)) is not None}
        if not all(map(self._is_given, given.values())):
            raise Unknown("an attention to what the region computes")
        names = {name: self.name(value) for name, value in given.items()}
        for name, value in zip(OUTPUTS, node.outputs, strict=True):
            names[name] = f"out{len(self.arrays)}"
            self.arrays[names[name]] = value.shape, value.dtype
            made = Leaf(names[name], value.dtype, value.shape[-1], after=0)
            self.known[value] = self.stored[value] = made
        cut, keys, y = cut_of(node), given["keys"], node.outputs[0]
        if cut.splits > 1:
            names["parts"] = f"out{len(self.arrays)}"
            shape = math.prod(y.shape[:-1]), cut.splits, y.shape[-1] + 2
            self.arrays[names["parts"]] = shape, mx.float32
        settings = {name: node.args[name] for name in ("heads", "rope", "scale")}
        tail, lasts = given["tail_keys"].shape[2], given["last"].type.size
        self.phases.append(Attention(names, keys.dtype, keys.shape, tail, settings, lasts, cut))

    def _pick(self, node: Node) -> None:
        """A phase, or the place that one has found in another dtype."""
        source, value = node.inputs[0], node.output
        if source in self.picks:
            phase = self.picks[source]
        else:
            e = self.readable(source)
            if not isinstance(e, Leaf) or isinstance(e, Summed) or rows_of(source) != self.rows:
                raise Unknown(f"an {node.op} of what is in no memory, or of other rows")
            phase = len(self.phases)
            parts = f"out{len(self.arrays)}"
            self.arrays[parts] = (self.rows, 2 * MOST_BLOCKS), mx.float32
            self.phases.append(Pick(e, source.shape[-1], parts))
        self.picks[value] = phase
        name = f"out{len(self.arrays)}"
        self.arrays[name] = value.shape, value.dtype
        made = Leaf(name, value.dtype, 1, after=phase)
        self.known[value] = self.stored[value] = made
        pick = self.phases[phase]
        assert isinstance(pick, Pick)
        pick.writes.append((name, value.dtype))

    def _product(self, node: Node) -> None:
        problem: Problem = node.args["problem"]
        if problem.dtype not in HALF:
            raise Unknown(f"a product of {problem.dtype}")
        x = self.readable(node.operand("x"))
        weight, scales = (self.name(part) for part in node.args["packed"])
        parts = self.parts_of(node)
        phase = self.phase(problem.replace(m=self.rows), x, weight, scales, parts)
        if parts == 1:
            self.known[node.output] = Part(phase, 0, node.output.dtype)
            return
        (split,) = self.body.users[node.output]
        for i, value in enumerate(split.outputs):
            self.known[value] = Part(phase, i, value.dtype)

    def phase(
        self, problem: Problem, x: Expression, weight: str, scales: str, parts: int,
        by: ByExpert | None = None,
    ) -> int:  # fmt: skip
        self.phases.append(Phase(problem, x, weight, scales, parts, by))
        return len(self.phases) - 1

    def _summed(self, node: Node) -> Expression:
        """What the product gives is put where all ranks find it, as the product is finished."""
        addend = node.inputs[0]
        if addend not in self.known:
            raise Unknown("a sum over the mesh of what comes from outside")
        e, nbytes = self.known[addend], addend.type.nbytes
        sum = Summed("", addend.dtype, addend.shape[-1], 0, phase_of(e), self.addends, nbytes)
        self._product_of(phase_of(e)).writes.append((sum, e))
        self.addends += nbytes
        return sum

    def parts_of(self, node: Node) -> int:
        """Into how many parts a product's result is split, where nothing else reads it."""
        readers = self.body.users.get(node.output, ())
        if len(readers) != 1 or readers[0].op != "split" or node.output in self.body.outputs:
            return 1
        widths = {value.shape[-1] for value in readers[0].outputs}
        return len(readers[0].outputs) if len(widths) == 1 and not min(widths) % 16 else 1

    def _normed(self, node: Node) -> Expression:
        out = node.output
        normed = Normed(self.readable(node.operand("x")), node.args["eps"], out.dtype)
        return Apply("multiply", (normed, self.row(node.operand("weight"), out)), out.dtype)

    def _split(self, node: Node) -> None:
        if node.outputs[0] in self.known:
            return
        e = self.in_memory(node.inputs[0])
        if not isinstance(e, Leaf):
            raise Unknown("a split of what is in no memory")
        offset = e.offset
        for value in node.outputs:
            self.known[value] = replace(e, offset=offset)
            offset += value.shape[-1]

    def _reshaped(self, node: Node) -> Expression:
        source = node.inputs[0]
        if source in self.known and source.shape[-1] == node.output.shape[-1]:
            return self.known[source]
        whole = self.stored.get(source)
        if whole is not None and whole.offset == 0 and rows_of(node.output) == self.rows:
            return Leaf(whole.name, whole.dtype, node.output.shape[-1], after=whole.after)
        if not self._is_given(source):
            raise Unknown("a reshape of what is in no memory")
        return Leaf(self.name(source), source.dtype, node.output.shape[-1])

    def _applied(self, node: Node) -> Expression:
        operands = [(v, self.row(v, node.output)) for v in node.inputs]
        if all(isinstance(e, Number) for _, e in operands):
            raise Unknown("an operation on numbers alone")
        latest = max(phase_of(e) for _, e in operands)
        # With what a product gives goes what is there when its sums are finished.
        if any(is_rowwise(e) or after(e) >= latest for _, e in operands):
            latest = -1
        if not self.experts.routing.precedes(latest, *(e for _, e in operands)):
            latest = -1
        args = [e if phase_of(e) in (-1, latest) else self._store(v) for v, e in operands]
        return Apply(node.op, tuple(args), node.output.dtype)


def _in_rows(e: Expression, value: Value) -> Expression:
    """An expression, if eight neighbours of it can be read or written at a time."""
    if value.shape[-1] % 8:
        raise Unknown(f"{value.shape[-1]} columns, no multiple of 8")
    if phase_of(e) < 0:
        for x in in_order(e):
            if isinstance(x, Routed):
                raise Unknown("a router's numbers beside what no product gives")
            if isinstance(x, Leaf) and (x.columns % 8 or x.offset % 8):
                raise Unknown(f"columns of {x.columns}, no multiple of 8")
    return e
