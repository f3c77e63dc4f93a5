"""Capturing an MLX function: what `mx.export_function` says of it, and what MLX does not say."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from ..errors import UnsupportedError
from ..origin import NOWHERE, Origin, raised_at, user_frame
from ..tracing.nodes import placeholder
from ..tree import Tree, flatten
from ..types import type_of
from .markers import Marker, Markers
from .notes import KEEP_IT, Notes, walk_ends_at
from .patches import patched
from .surroundings import Surroundings
from .ways import way_round

Primitive = dict[str, Any]


@dataclass
class Capture:
    """A function's graph as MLX hands it over; arrays go by MLX's keys.

    Attributes:
        weights: parameters of modules by path.
        inputs: keys of the weights and then of the arguments.
        constants: arrays that are neither.
        primitives: in program order, each with its name, arguments, inputs and outputs.
        outputs: keys of what the function returns.
        origins: of the arrays whose making was noted.
        captured: arrays that the function sees as variables, evaluated or not, and their names.
        form: of the tree that the function returns.
        markers: calls that kernels of the importer's own stand for.
        modules: that the function is, is bound to or sees.
    """

    weights: dict[str, mx.array]
    inputs: list[str]
    constants: dict[str, mx.array]
    primitives: list[Primitive]
    outputs: list[str]
    origins: dict[str, Origin]
    captured: dict[str, tuple[str, mx.array]]
    form: Tree
    markers: Markers
    modules: list[Module] = field(default_factory=list)

    def marker(self, primitive: Primitive) -> Marker | None:
        """The call that a kernel of the importer's own stands for."""
        return self.markers.of(str(primitive["arguments"][0]))


def title(fn: Any) -> str:
    """What to call the function in a message."""
    return str(getattr(fn, "__name__", fn.__class__.__name__)).strip("<>")


def capture(fn: Callable[..., Any], arrays: Sequence[mx.array], tree: Tree) -> Capture:
    """What `fn` does to arrays like `arrays`, which stand for the leaves of its arguments.

    Raises:
        UnsupportedError: MLX cannot hand the function over, or an array that the function sees as
            a variable is updated in place; names the primitive or the array, and the line.
    """
    around = Surroundings.of(fn)
    names = {id(array): name for name, array in around.arrays.items()}
    random: Any = mx.random.state
    high, low = random[0].tolist()
    try:
        with ExitStack() as undo:
            tried: set[str] = set()
            while True:
                try:
                    return _attempt(fn, around, arrays, tree, Notes(around.paths(), names))
                except UnsupportedError as error:
                    noted = error
                if noted.hint in (_NO_EVAL, KEEP_IT):
                    raise noted
                left = [name for name in ("captured", "Load", "Compiled") if name not in tried]
                uses = noted.what.partition(" uses ")[2]
                remedy = next((r for r in left if r == "captured" or uses.startswith(r)), "")
                if not uses or not remedy:
                    break
                tried.add(remedy)
                if remedy == "captured":
                    # What they are computed from is handed over too, unless they are evaluated.
                    mx.eval(list(around.arrays.values()))
                elif remedy == "Load":
                    # Arrays of a file that are read when they are first used: so use them.
                    args, kwargs = tree.build([placeholder(type_of(a)) for a in arrays])
                    mx.eval(flatten(fn(*args, **kwargs))[0])
                else:
                    # A compiled function that is called on constants alone; it was not refused if
                    # compiling was off, so it is on.
                    mx.disable_compile()
                    undo.callback(mx.enable_compile)
            # With its notes the function keeps what it computes and throws away; without, not.
            try:
                return _attempt(fn, around, arrays, tree, None)
            except UnsupportedError as error:
                raise (noted if noted.what == error.what else error) from None
    finally:
        # A key is the two halves of a seed, so this is the state as it was.
        mx.random.seed((high << 32) | low)


def _attempt(
    fn: Callable[..., Any],
    around: Surroundings,
    arrays: Sequence[mx.array],
    tree: Tree,
    notes: Notes | None,
) -> Capture:
    said: list[dict[str, Any]] = []
    forms: list[Tree] = []
    markers = Markers()
    weights = list(around.weights.values())
    captured = list(around.arrays.values())

    def flat(*given: mx.array) -> list[mx.array]:
        with around.holding(given[: len(weights)]):
            args, kwargs = tree.build(given[len(weights) :])
            leaves, form = flatten(fn(*args, **kwargs), static=True)
        forms.append(form)
        # Notes come first: MLX then hands the primitives over in the order of the program.
        return [*(notes.arrays if notes else []), *captured, *leaves]

    walk_ends_at(flat)
    # Others of their types: MLX refuses a function that sees an argument as a variable too.
    examples = [placeholder(type_of(a)) for a in (*weights, *arrays)]
    try:
        with patched(notes, markers):
            mx.export_function(said.append, flat, *examples)
    except UnsupportedError:
        raise
    except (ValueError, RuntimeError) as error:
        raise _refused(error, fn, said, notes, markers) from None
    for origin in (o if o.line else user_frame() for o in (notes.unkeyed if notes else ())):
        warnings.warn_explicit(
            f"from_mlx: {title(fn)} draws random numbers without a key, so the graph gives the "
            "same ones at every call; pass key=, an argument of the function, and leave out what "
            "draws them in training (model.eval() switches nn.Dropout off)",
            UserWarning,
            origin.file,
            origin.line,
        )
    keys = [key for key, _, _ in _only(said, "outputs")]
    count = len(notes.arrays) if notes else 0
    end = count + len(captured)
    return Capture(
        weights=around.weights,
        inputs=[key for key, _, _ in _only(said, "inputs")],
        constants=dict(_only(said, "constants")),
        primitives=[r for r in said if r["type"] == "primitive"],
        outputs=keys[end:],
        origins=dict(zip(keys[:count], notes.origins, strict=True)) if notes else {},
        captured=dict(zip(keys[count:end], around.arrays.items(), strict=True)),
        form=forms[-1],
        markers=markers,
        modules=[*around.modules.values()],
    )


def _only(said: Sequence[Mapping[str, Any]], kind: str) -> Any:
    return next(r[kind] for r in said if r["type"] == kind)


_NO_EVAL = "leave out mx.eval, .item(), .tolist() and Python conditions on arrays"


def _refused(
    error: Exception,
    fn: Any,
    said: Sequence[dict[str, Any]],
    notes: Notes | None,
    markers: Markers,
) -> UnsupportedError:
    words = str(error)
    line = raised_at(error)
    last = None if line is NOWHERE else line  # None is who called us
    found = re.search(r"primitive (\w+)", words)
    if re.search(r"(vjp|jvp|vmap).*CustomKernel", words) and markers.calls:
        calls = sorted({call.op for call in markers.calls})
        return UnsupportedError(
            f"from_mlx: {title(fn)} transforms {', '.join(calls)}, by grad, vjp, jvp or vmap",
            hint="MLX does not hand it over, and its way in here has no transforms: leave them out",
            origin=last,
        )
    if found:
        return UnsupportedError(
            f"from_mlx: {title(fn)} uses {found[1]}, which MLX does not hand over",
            hint=way_round(found[1]),
            origin=_first_missing(said, notes) or last,
        )
    if "eval" in words.lower():
        return UnsupportedError(
            f"from_mlx: {title(fn)} evaluates an array while it is imported",
            hint=_NO_EVAL,
            origin=last,
        )
    return UnsupportedError(f"from_mlx: {title(fn)}: {words}", origin=last)


def _first_missing(said: Sequence[dict[str, Any]], notes: Notes | None) -> Origin | None:
    """The first noted array that no primitive had made when the export broke off."""
    if notes is None or not any(r["type"] == "outputs" for r in said):
        return None
    known = {key for r in said if r["type"] == "primitive" for key, _, _ in r["outputs"]}
    known |= {key for key, _, _ in _only(said, "inputs")}
    known |= set(dict(_only(said, "constants")))
    keys = [key for key, _, _ in _only(said, "outputs")]
    pairs = zip(keys, notes.origins, strict=False)
    return next((origin for key, origin in pairs if key not in known), None)
