"""qgraph: a graph compiler for quantized inference on MLX.

>>> import mlx.core as mx, qgraph as qg
>>> graph = qg.trace(lambda x: qg.tanh(x) + 1, qg.spec((2, 3)))
"""

from __future__ import annotations

import difflib
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

from mlx.core import (
    bfloat16,
    bool_,
    complex64,
    float16,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    uint64,
)

from . import errors, fitting, tree
from .compiler.api import compile, jit, load
from .compiler.pipeline import default_passes, optimize
from .compiler.plan import Plan
from .compiler.program import Program
from .errors import QGraphError
from .importer import call, from_mlx
from .ir.graph import Graph, Node, Value
from .ir.left_out import LEFT_OUT
from .ir.ops import namespace
from .mesh import Mesh
from .quantization.calls import dequantize, gather_qmm, quantize, quantized_matmul
from .quantization.config import Quantize
from .rewrite.history import Pass
from .target import Target, as_target
from .tracing.activations import gelu, relu, silu
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
distributed = namespace("distributed", FUNCTIONS)

for _name, _function in FUNCTIONS.items():
    if "." not in _name and not _name.startswith("at_"):
        globals().setdefault(_name, _function)
del _name, _function


def __getattr__(name: str) -> Any:
    """`qg.lm`, which needs mlx-lm, is imported when it is first asked for."""
    if name == "lm":
        return importlib.import_module("qgraph.lm")
    reason = f": {LEFT_OUT[name]}" if name in LEFT_OUT else "; its ops are those of mlx.core"
    if name not in LEFT_OUT and (near := difflib.get_close_matches(name, globals(), 1)):
        reason = f"; did you mean {near[0]!r}?"
    raise AttributeError(f"module 'qgraph' has no attribute {name!r}{reason}")


# The ops of the table are exported as well, and MLX's dtypes; see docs/ops.md.
__all__ = [
    "Graph",
    "Mesh",
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
    "bfloat16",
    "bool_",
    "call",
    "compile",
    "complex64",
    "cond",
    "default_passes",
    "dequantize",
    "distributed",
    "errors",
    "fast",
    "fft",
    "fitting",
    "float16",
    "float32",
    "float64",
    "fori_loop",
    "from_mlx",
    "gather_qmm",
    "gelu",
    "int8",
    "int16",
    "int32",
    "int64",
    "jit",
    "keep",
    "linalg",
    "load",
    "optimize",
    "quantize",
    "quantized_matmul",
    "random",
    "relu",
    "scan",
    "silu",
    "spec",
    "tensor",
    "trace",
    "tree",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "while_loop",
]
