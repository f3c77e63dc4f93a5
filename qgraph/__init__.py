"""qgraph: a graph compiler for quantized inference on MLX.

>>> import mlx.core as mx, qgraph as qg
>>> graph = qg.trace(lambda x: qg.tanh(x) + 1, qg.spec((2, 3)))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from .api import compile, jit
from .artefact import load
from .control_flow import cond, fori_loop, scan, while_loop
from .errors import QGraphError
from .functions import FUNCTIONS
from .importer import call, from_mlx
from .ir import Graph, Node, Value
from .ops import namespace
from .pipeline import Pass, default_passes, optimize
from .plan import Plan
from .program import Program
from .quantization import dequantize, gather_qmm, quantize, quantized_matmul
from .quantize_config import Quantize
from .target import Target, as_target
from .tensor import Tensor
from .trace import keep, tensor, trace
from .types import TensorType, spec

fast = namespace("fast", FUNCTIONS)
random = namespace("random", FUNCTIONS)
fft = namespace("fft", FUNCTIONS)
linalg = namespace("linalg", FUNCTIONS)

for _name, _function in FUNCTIONS.items():
    if "." not in _name and not _name.startswith("at_"):
        globals().setdefault(_name, _function)
del _name, _function

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


__version__ = "0.1.0"

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
