"""Looking at graphs: as text, JSON, DOT and pages; diffs, profiles, timelines and reasons.

A format is one file with a function from a graph to text, and one row here: `graph.save` and the
`to_…` methods of a graph find it by its suffix.
"""

from __future__ import annotations

from typing import Any

from ..ir.graph import READERS, WRITERS, Graph
from .dot import to_dot
from .serialize import from_json, to_json
from .text import Format, format_graph

__all__ = ["Format"]


def _text(graph: Graph, **options: Any) -> str:
    return format_graph(graph, Format(**options))


def _html(graph: Graph) -> str:
    from .viewer import to_html  # heavy, and most sessions write no page

    return to_html(graph)


def _model_explorer(graph: Graph) -> str:
    from .viewer.model_explorer import to_model_explorer

    return to_model_explorer(graph)


WRITERS |= {
    ".txt": _text,
    ".json": to_json,
    ".me.json": _model_explorer,
    ".dot": to_dot,
    ".html": _html,
}
READERS[".json"] = from_json
