"""How values lie on a mesh, and how ops take and give them: a rule for each op of the table."""

from .placement import PARTIAL, REPLICATED, Placement, local_type, owned, split
from .rules import spec_of
from .spec import Dim, Spec

__all__ = [
    "PARTIAL",
    "REPLICATED",
    "Dim",
    "Placement",
    "Spec",
    "local_type",
    "owned",
    "spec_of",
    "split",
]
