"""What a graph is: nodes and values, the table of ops, loops and their bodies."""

from .graph import Graph, Node, Value, constant_value, input_value, map_values, reachable
from .op import Op
from .ops import OPS

__all__ = [
    "OPS",
    "Graph",
    "Node",
    "Op",
    "Value",
    "constant_value",
    "input_value",
    "map_values",
    "reachable",
]
