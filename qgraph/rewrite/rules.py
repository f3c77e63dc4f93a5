"""Rewrite rules as data: a pattern and its replacement, written in the DSL itself.

    from qgraph.rewrite import ApplyRules, Rule

    square = Rule("square", lambda x: x * x, lambda x: qg.square(x))
    plan = qg.optimize(graph, passes=[ApplyRules((square,)), *qg.default_passes()])

`plan.ledger()` shows what each rule did, why its `check` refused a match, and, for a pattern of
several ops that matched nowhere, the node that came nearest.  `plan.check(*inputs)` names the rule
if it does not keep its contract.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import InputError, QGraphError
from ..ir.graph import Graph, Node, Value
from ..tracing.tensor import Tensor, apply
from .contracts import is_contract
from .ledger import Decision, Entry, record
from .patterns import Attempt, Call, match_node, read_pattern
from .rewriter import rewrite_each


@dataclass(frozen=True)
class Match:
    """A pattern that fits.

    Attributes:
        node: whose output is replaced.
        bindings: what each variable of the pattern stands for: a `Tensor`, or a static setting.
    """

    node: Node
    bindings: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Args:
        name: as the ledger prints it.
        pattern: takes variables, gives the result of an op of one output.  Every parameter is a
            variable, for a tensor or for a static setting.  Call quantized ops through `op`.
        replacement: takes what the variables stand for, by name; gives a tensor of the same type.
        check: gets a `Match`; returns None, or in words why the rule must not apply there.
        contract: "exact" (bit for bit), "dtype-preserving" (within what the dtype is good for),
            or "tolerance 1e-3", a relative error.
    """

    name: str
    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    check: Callable[[Match], str | None] | None = None
    contract: str = "exact"

    def __post_init__(self) -> None:
        if not is_contract(self.contract):
            raise InputError(
                f"the rule {self.name} has the contract {self.contract!r}",
                hint="give 'exact', 'dtype-preserving' or 'tolerance 1e-3'",
            )
        names = inspect.signature(self.pattern).parameters
        try:
            inspect.signature(self.replacement).bind(**dict.fromkeys(names))
        except TypeError as error:
            raise InputError(
                f"the replacement of the rule {self.name} cannot be called: {error}",
                hint=f"it is given the variables of the pattern by name: {', '.join(names)}",
            ) from None

    @cached_property
    def tree(self) -> Call:
        return read_pattern(self.pattern)[0]

    def size(self) -> int:
        """Ops in the pattern."""
        return _size(self.tree)


def op(name: str, *args: Any, **settings: Any) -> Any:
    """Call an op by name, without the checks of `qg.dequantize` and its like, for patterns."""
    return apply(name, args, settings)


def _size(arg: Any) -> int:
    if isinstance(arg, Call):
        return 1 + sum(map(_size, arg.args.values()))
    return sum(map(_size, arg)) if isinstance(arg, tuple | list) else 0


@dataclass(frozen=True)
class ApplyRules:
    """The pass that applies rules, the first that fits, node by node and in loop bodies.

    Leaves alone nodes whose stream the user chose.

    Args:
        rules: in order of preference.
        explain: write what they did and why not into the ledger.

    Raises:
        QGraphError: a replacement has another type than what it replaces.

    >>> import qgraph as qg
    >>> rule = Rule("square", lambda x: x * x, lambda x: qg.square(x))
    >>> graph = qg.trace(lambda a: qg.exp(a) * qg.exp(a) + a * a, qg.spec((4,)), name="f")
    >>> plan = qg.optimize(graph, passes=[ApplyRules((rule,))])
    >>> [str(e).split(" ")[0] for e in plan.ledger()]
    ['rewritten']
    """

    rules: tuple[Rule, ...]
    explain: bool = True
    name: str = "apply-rules"

    @property
    def contract(self) -> str:
        """The weakest of the rules'."""
        return max((rule.contract for rule in self.rules), key=_looseness, default="exact")

    def __call__(self, graph: Graph) -> Graph:
        run = _Run(self)
        result = rewrite_each(graph, run.visit, self.name, {rule.tree.op for rule in self.rules})
        if self.explain:
            run.report_misses()
        return result


def _looseness(contract: str) -> float:
    """Contracts in order: a number of their own comes after what a dtype allows."""
    if contract == "exact":
        return -1.0
    return float(contract.split()[1]) if " " in contract else 0.0


@dataclass
class _Run:
    """One run over a graph, with the nearest miss of each rule."""

    owner: ApplyRules
    matched: set[str] = field(default_factory=set)
    nearest: dict[str, tuple[Attempt, Node]] = field(default_factory=dict)

    def visit(self, node: Node) -> Sequence[Value] | None:
        if node.stream is not None or node.stage != "run" or len(node.outputs) != 1:
            return None
        for rule in self.owner.rules:
            if rule.tree.op == node.op and (made := self._try(rule, node)) is not None:
                return [made.value]
        return None

    def _try(self, rule: Rule, node: Node) -> Tensor | None:
        attempt = Attempt()
        for found in match_node(rule.tree, node, attempt):
            self.matched.add(rule.name)
            bindings = {k: Tensor(v) if isinstance(v, Value) else v for k, v in found.items()}
            why = rule.check(Match(node, bindings)) if rule.check is not None else None
            if why is None:
                return self._replace(rule, node, bindings)
            self._note(rule, node, "refused", why)
        best = self.nearest.get(rule.name)
        if attempt.ops and (best is None or attempt.ops > best[0].ops):
            self.nearest[rule.name] = (attempt, node)
        return None

    def _replace(self, rule: Rule, node: Node, bindings: dict[str, Any]) -> Tensor:
        made = rule.replacement(**bindings)
        if not isinstance(made, Tensor):
            raise QGraphError(
                f"the replacement of the rule {rule.name} gives {made!r:.40}, not a tensor",
                hint="build it of qgraph's ops on what the variables stand for",
                origin=node.origin,
            )
        if made.value.type != node.output.type:
            raise QGraphError(
                f"the rule {rule.name} replaces {node.output.type} by {made.value.type}",
                hint="cast or broadcast in the replacement, or refuse such a match in `check`",
                origin=node.origin,
            )
        self._note(rule, node, "rewritten", "")
        return made

    def _note(self, rule: Rule, node: Node, decision: Decision, why: str) -> None:
        if self.owner.explain:
            reason = f"rule {rule.name}" + (f": {why}" if why else "")
            record(Entry.of(node, self.owner.name, decision, reason))

    def report_misses(self) -> None:
        for rule in self.owner.rules:
            if rule.name in self.nearest and rule.name not in self.matched and rule.size() > 1:
                attempt, node = self.nearest[rule.name]
                self._note(rule, node, "refused", f"nearest miss: {attempt.why}")
