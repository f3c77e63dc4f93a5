"""Ways round what cannot be imported, by the name of the primitive."""

from __future__ import annotations

_GRADIENT = "import the function without its gradient, and differentiate in MLX"
_DISTRIBUTED = "import each process' part alone, and communicate outside of it"
_KERNEL = "keep the kernel outside: import what stands before and after it, and call it between"
_UNSEEN = {
    "BitwiseInvert": "bitwise_invert", "Contiguous": "contiguous", "CumLogAddExp": "logcumsumexp",
    "FromFP8": "from_fp8(...) or mx.dequantize", "GatherQQMM": "gather_qqmm", "LUF": "linalg.lu",
    "QQMatmul": "qqmm", "SegmentedMM": "segmented_mm", "ToFP8": "to_fp8(...) or mx.quantize",
}  # fmt: skip
"""What is carried where it is called as `mx.name`, but not through a reference made before."""
_WAYS = {
    **{
        name: f"write mx.{function}(...) in the function itself; a reference that was made to it "
        "before, as by `from mlx.core import`, goes past the import"
        for name, function in _UNSEEN.items()
    },
    "CustomKernel": _KERNEL,
    "CustomTransforms": "call the function under mx.custom_function or mx.checkpoint itself",
    "Load": "call mx.eval on the arrays of mx.load before",
    "Compiled": "import the function under mx.compile itself, or call mx.disable_compile before",
    "CrossEntropy": "import the function without its loss",
    "GatedDeltaUpdate": "import on the CPU, where it arrives as its parts: "
    "mx.set_default_device(mx.cpu)",
    **dict.fromkeys(
        ("CrossEntropyVJP", "GatedDeltaUpdateVJP", "ScaledDotProductAttentionVJP"), _GRADIENT
    ),
    **dict.fromkeys(("AllReduce", "AllGather", "Send", "Recv", "ReduceScatter"), _DISTRIBUTED),
}


def way_round(primitive: str) -> str:
    """What a person can do who needs the primitive.

    >>> way_round("Load")
    'call mx.eval on the arrays of mx.load before'
    """
    return _WAYS.get(primitive, "compute what needs it outside of the function and pass it in")
