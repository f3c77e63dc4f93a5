"""qgraph: a graph compiler for quantized inference on MLX.

>>> import mlx.core as mx, qgraph as qg
>>> graph = qg.trace(lambda x: qg.tanh(x) + 1, qg.spec((2, 3)))
"""

from __future__ import annotations

import importlib
from typing import Any

try:
    import mlx.core as _mx
except ImportError as error:
    raise ImportError(
        "qgraph needs an MLX backend: install one of its extras, "
        "pip install 'qgraph[cpu]', 'qgraph[cuda12]' or 'qgraph[cuda13]' "
        f"(on Apple silicon, pip install qgraph is enough). MLX said: {error}"
    ) from error
del _mx

from . import errors, tree
from .compiler.api import compile, jit, load
from .compiler.pipeline import default_passes, optimize
from .compiler.plan import Plan
from .compiler.program import Program
from .errors import QGraphError
from .importer import call, from_mlx
from .ir.graph import Graph, Node, Value
from .ir.ops import namespace
from .quantization.checked import dequantize, gather_qmm, quantize, quantized_matmul
from .quantization.config import Quantize
from .rewrite.history import Pass
from .target import Target, as_target
from .tracing.control_flow import cond, fori_loop, scan, while_loop
from .tracing.functions import FUNCTIONS
from .tracing.tensor import Tensor
from .tracing.trace import keep, tensor, trace
from .types import TensorType, spec
from .version import __version__ as __version__

fast = namespace("fast", FUNCTIONS)
random = namespace("random", FUNCTIONS)
fft = namespace("fft", FUNCTIONS)
linalg = namespace("linalg", FUNCTIONS)

for _name, _function in FUNCTIONS.items():
    if "." not in _name and not _name.startswith("at_"):
        globals().setdefault(_name, _function)
del _name, _function


def __getattr__(name: str) -> Any:
    """`qg.lm`, which needs mlx-lm, is imported when it is first asked for."""
    if name == "lm":
        return importlib.import_module("qgraph.lm")
    raise AttributeError(f"module 'qgraph' has no attribute {name!r}")


# The ops of the table are exported as well; see docs/ops.md.
__all__ = [
    "Graph",
    "Node",
    "Pass",
    "Plan",
    "Program",
    "QGraphError",
    "Quantize",
    "Target",
    "Tensor",
    "TensorType",
    "Value",
    "as_target",
    "call",
    "compile",
    "cond",
    "default_passes",
    "dequantize",
    "errors",
    "fast",
    "fft",
    "fori_loop",
    "from_mlx",
    "gather_qmm",
    "jit",
    "keep",
    "linalg",
    "load",
    "optimize",
    "quantize",
    "quantized_matmul",
    "random",
    "scan",
    "spec",
    "tensor",
    "trace",
    "tree",
    "while_loop",
]
