"""Where in the user's code a node came from."""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PASSES = os.path.realpath(os.path.join(_HERE, "passes")) + os.sep
_EXAMPLES = os.path.join(_HERE, "examples") + os.sep


@dataclass(frozen=True, slots=True)
class Origin:
    """File and line of the user's call; `made_by` names the pass that made the node, if one did."""

    file: str = ""
    line: int = 0
    made_by: str = ""
    label: str = ""
    """Says more where there is no line: the path of a parameter in an imported module."""

    def __str__(self) -> str:
        if self.line:
            return f"{os.path.basename(self.file)}:{self.line}"
        return self.label

    def source(self) -> str:
        """The text of the line, or an empty string where the file cannot be read."""
        return linecache.getline(self.file, self.line).strip() if self.line else ""

    def by(self, name: str) -> Origin:
        return replace(self, made_by=name)


NOWHERE = Origin()
_interned: dict[tuple[str, int], Origin] = {}


def is_ours(file: str) -> bool:
    """Is this a file of qgraph itself?  Examples are programs of a user."""
    if file == contextlib.__file__:  # between a `with` of ours and what stands behind it
        return True
    return (file.startswith(_HERE) and not file.startswith(_EXAMPLES)) or file.startswith(_PASSES)


_ours: dict[str, bool] = {}


def variable_name(thing: object) -> str:
    """The variable that holds `thing` in the innermost frame of the user's, or an empty string."""
    frame = sys._getframe(1)
    while frame is not None and is_ours(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return ""
    for name, value in frame.f_locals.items():
        if value is thing:
            return name
    for name in frame.f_code.co_names:
        if frame.f_globals.get(name) is thing:
            return name
    return ""


stated: ContextVar[Origin | None] = ContextVar("stated", default=None)
"""Where nodes come from while they are made for somebody else, as by an import."""


@contextlib.contextmanager
def stating(origin: Origin) -> Iterator[None]:
    """Nodes that are made while this is open come from `origin`."""
    token = stated.set(origin)
    try:
        yield
    finally:
        stated.reset(token)


class Maker:
    """A pass that makes nodes, and the origin of the node that they stand for.

    Attributes:
        origin: None while the pass is between two nodes.
    """

    __slots__ = ("made_by", "origin")

    def __init__(self, made_by: str) -> None:
        self.made_by = made_by
        self.origin: Origin | None = None


making: ContextVar[Maker | None] = ContextVar("making", default=None)
"""Set while a pass rewrites a graph, so that each node has its origin from the beginning."""


def renewed(origin: Origin) -> Origin:
    """The origin of a node that takes the place of one with this origin."""
    maker = making.get()
    if maker is None or maker.origin is None or origin.made_by:
        return origin
    return maker.origin.by(maker.made_by)


def user_frame() -> Origin:
    """Where a node that is made now comes from: in a pass, the node it is at; else the innermost
    frame that is not qgraph's own."""
    if (origin := stated.get()) is not None:
        return origin
    maker = making.get()
    if maker is not None and maker.origin is not None:
        return maker.origin.by(maker.made_by)
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        ours = _ours.get(file)
        if file == "<string>" and frame.f_code.co_name == "__init__":
            ours = True  # of a dataclass
        elif ours is None:
            ours = _ours[file] = is_ours(file)
        if not ours:
            key = (file, frame.f_lineno)
            found = _interned.get(key)
            if found is None:
                found = _interned[key] = Origin(*key)
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return NOWHERE


def raised_at(error: BaseException) -> Origin:
    """The innermost line that is not qgraph's own which the error came through."""
    found, trace = NOWHERE, error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not is_ours(file):
            found = Origin(file, trace.tb_lineno)
        trace = trace.tb_next
    return found
