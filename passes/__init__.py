"""The optimizer: passes from graph to graph, one a file."""

from .assign_streams import AssignStreams
from .choose_attention import ChooseAttention
from .choose_kernel import ChooseKernel
from .eliminate_common_subexpressions import EliminateCommonSubexpressions
from .eliminate_dead_code import EliminateDeadCode
from .fold_constants import FoldConstants
from .fold_scales import FoldScales
from .form_grid_regions import FormGridRegions
from .form_regions import FormRegions
from .fuse_cache import FuseCache
from .fuse_quantized_matmul import FuseQuantizedMatmul
from .fuse_residuals import FuseResiduals
from .fuse_sums import FuseSums
from .hoist_quantize import HoistQuantize
from .legalize import Legalize
from .merge_matmuls import MergeMatmuls
from .merge_views import MergeViews
from .overlap_collectives import OverlapCollectives
from .pack_results import PackResults
from .quantize_weights import QuantizeWeights
from .raise_attention import RaiseAttention
from .raise_dequantize import RaiseDequantize
from .raise_layer_norm import RaiseLayerNorm
from .raise_rms_norm import RaiseRmsNorm
from .raise_rope import RaiseRope
from .read_packed_rows import ReadPackedRows
from .round_activations import RoundActivations
from .shard import Shard
from .simplify import Simplify
from .sink_dequantize import SinkDequantize
from .spell_out_convolutions import SpellOutConvolutions
from .stored_scales import StoredScales
from .tail_caches import TailCaches
from .widen_half import WidenHalf

__all__ = [
    "AssignStreams",
    "ChooseAttention",
    "ChooseKernel",
    "EliminateCommonSubexpressions",
    "EliminateDeadCode",
    "FoldConstants",
    "FoldScales",
    "FormGridRegions",
    "FormRegions",
    "FuseCache",
    "FuseQuantizedMatmul",
    "FuseResiduals",
    "FuseSums",
    "HoistQuantize",
    "Legalize",
    "MergeMatmuls",
    "MergeViews",
    "OverlapCollectives",
    "PackResults",
    "QuantizeWeights",
    "RaiseAttention",
    "RaiseDequantize",
    "RaiseLayerNorm",
    "RaiseRmsNorm",
    "RaiseRope",
    "ReadPackedRows",
    "RoundActivations",
    "Shard",
    "Simplify",
    "SinkDequantize",
    "SpellOutConvolutions",
    "StoredScales",
    "TailCaches",
    "WidenHalf",
]
