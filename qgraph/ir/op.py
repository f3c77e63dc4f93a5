"""`Op`: an entry of the table of operations, and how its line is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from .own_ops import OWN

_WEAK = {
    "where": frozenset({"x", "y"}),
    "clip": frozenset({"a", "a_min", "a_max"}),
    "array_equal": frozenset({"a", "b"}),
}


@dataclass(frozen=True)
class Op:
    """An entry: how the op is called and what it is.

    Attributes:
        name: as users call it, such as "softmax" or "fast.rms_norm".
        kind: the heading it stands under.
        fn: MLX's function, or the few lines here that stand for a method of `mx.array`.
        signature: parameters in MLX's order; `stream` is added to every op.
        cost: a word of `kinds.COSTS`; empty where the table does not say, which a test refuses.
        traits: words of `kinds.TRAITS`.
    """

    name: str
    kind: str
    fn: Callable[..., Any]
    signature: inspect.Signature
    cost: str = ""
    traits: frozenset[str] = frozenset()

    @cached_property
    def scalar_operands(self) -> frozenset[str]:
        """Parameters whose Python numbers become 0-d constants."""
        if self.kind == "elementwise":
            return frozenset(self.signature.parameters)
        return frozenset({"condition", "x", "y"}) if self.name == "where" else frozenset()

    @cached_property
    def weak_operands(self) -> frozenset[str]:
        """Parameters whose numbers and NumPy arrays take their dtype from the tensors beside them.

        `logical_and` and its like are not among them: beside int8, 256 is true.
        """
        if self.name.startswith("logical_"):
            return frozenset()
        if self.kind == "elementwise":
            return frozenset(self.signature.parameters)
        return _WEAK.get(self.name, frozenset())

    @cached_property
    def _layout(
        self,
    ) -> tuple[tuple[tuple[str, Any], ...], str | None, tuple[tuple[str, Any], ...]]:
        parameters = self.signature.parameters.values()
        places = tuple((p.name, p.default) for p in parameters if p.kind < p.VAR_POSITIONAL)
        star = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), None)
        keywords = tuple((p.name, p.default) for p in parameters if p.kind == p.KEYWORD_ONLY)
        return places, star, keywords

    @cached_property
    def _positional(self) -> tuple[list[str], int]:
        """Names that arguments in order bind to, and the fewest that a call needs."""
        parameters = self.signature.parameters.values()
        if any(p.kind == p.VAR_POSITIONAL for p in parameters):
            return [], 1
        needed = [p.name for p in parameters if p.default is p.empty]
        names = [p.name for p in parameters if p.kind < p.VAR_POSITIONAL]
        return (names, len(needed)) if set(needed) <= set(names) else ([], 1)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of a call by parameter.

        Raises:
            TypeError: the op cannot be called so; the words are Python's own.
        """
        names, fewest = self._positional
        if not kwargs and fewest <= len(args) <= len(names):  # most calls; ten times as fast
            return dict(zip(names, args, strict=False))
        return self.signature.bind(*args, **kwargs).arguments

    def call(self, args: Mapping[str, Any], stream: Any = None, group: Any = None) -> Any:
        """Call MLX with arrays in the places of a node's values.

        Args:
            group: the ranks that a collective talks to.
        """
        places, star, keywords = self._layout
        given = [_as_list(args.get(name, default)) for name, default in places]
        if star is not None:
            given.extend(args[star])
        named = {n: args[n] for n, default in keywords if n in args and args[n] is not default}
        if stream is not None and self.kind not in ("local", "chosen kernels", "placement"):
            named["stream"] = stream
        if group is not None and self.kind == "collective":
            named["group"] = group
        return self.fn(*given, **named)

    def __str__(self) -> str:
        return f"{self.name}{self.signature}".replace("mlx.core.", "")


def _as_list(arg: Any) -> Any:
    """MLX takes several arrays as a list; a node keeps them as a tuple."""
    if isinstance(arg, tuple) and any(isinstance(a, mx.array) for a in arg):
        return list(arg)
    return arg


_COSTS = dict.fromkeys(
    ("elementwise", "elementwise with settings", "reduction", "cumulative", "sorting", "random",
     "fft", "linear algebra"), "each",
)  # fmt: skip
"""What ops of a kind cost whose line does not say; of other kinds every line does."""


def parse(kind: str, lines: str) -> list[Op]:
    """The ops of a kind, one a line of the table."""
    entries: list[str] = []
    for line in lines.strip().splitlines():
        if entries and entries[-1].count("(") > entries[-1].count(")"):
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    ops = []
    for entry in entries:
        signature, _, facts = entry.rpartition(")")
        name, parameters = signature.split("(", 1)
        function = eval(f"lambda {parameters}: None", vars(mx))
        fn = OWN.get(name) or _resolve(name)
        cost, *traits = facts.removeprefix(": ").split(", ")
        cost = cost or _COSTS.get(kind, "")
        ops.append(Op(name, kind, fn, inspect.signature(function), cost, frozenset(traits)))
    return ops


def _resolve(name: str) -> Callable[..., Any]:
    found: Any = mx
    for word in name.split("."):
        found = getattr(found, word)
    fn: Callable[..., Any] = found
    return fn
