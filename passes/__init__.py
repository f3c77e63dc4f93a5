"""The optimizer: passes from graph to graph, one a file."""

from .assign_streams import AssignStreams
from .choose_kernel import ChooseKernel
from .eliminate_common_subexpressions import EliminateCommonSubexpressions
from .eliminate_dead_code import EliminateDeadCode
from .fold_constants import FoldConstants
from .fuse_quantized_matmul import FuseQuantizedMatmul
from .hoist_quantize import HoistQuantize
from .legalize import Legalize
from .quantize_weights import QuantizeWeights
from .raise_dequantize import RaiseDequantize
from .simplify import Simplify
from .sink_dequantize import SinkDequantize
from .widen_half import WidenHalf

__all__ = [
    "AssignStreams",
    "ChooseKernel",
    "EliminateCommonSubexpressions",
    "EliminateDeadCode",
    "FoldConstants",
    "FuseQuantizedMatmul",
    "HoistQuantize",
    "Legalize",
    "QuantizeWeights",
    "RaiseDequantize",
    "Simplify",
    "SinkDequantize",
    "WidenHalf",
]
