"""A spread graph as one rank runs it, and as one process runs it for all ranks."""

from __future__ import annotations

from ...ir.graph import Graph
from ...mesh import Mesh
from .ops import is_collective, is_spread
from .ranks import for_rank
from .states import Part, keeping_parts, note_parts
from .together import in_one_process

__all__ = [
    "Part",
    "for_mesh",
    "for_rank",
    "in_one_process",
    "is_collective",
    "is_spread",
    "keeping_parts",
    "note_parts",
]


def for_mesh(graph: Graph, mesh: Mesh | None) -> Graph:
    """The graph that this process runs: its rank's, or one that runs every rank in turn."""
    if mesh is None or mesh.size == 1 or not is_spread(graph):
        return graph
    return in_one_process(graph, mesh.size) if mesh.rank is None else for_rank(graph, mesh.rank)
