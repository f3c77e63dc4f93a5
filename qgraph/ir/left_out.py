"""What of `mlx.core` is no op of qgraph, and why."""

from __future__ import annotations

LEFT_OUT = {
    "asarray": "makes an array from Python data; call mx.asarray before tracing",
    "array": "makes an array; call mx.array before tracing",
    "broadcast_shapes": "computes on shapes, not on arrays",
    "can_cast": "answers about dtypes, not about arrays",
    "checkpoint": "for training; qgraph is for inference",
    "custom_function": "for training; call the function itself",
    "depends": "orders evaluation, which qgraph does itself",
    "einsum_path": "returns a plan, not an array",
    "empty": "its contents are not defined; use zeros",
    "empty_like": "its contents are not defined; use zeros_like",
    "from_dlpack": "makes an array from another library's; call it before tracing",
    "grad": "a transformation of functions for training",
    "isdtype": "answers about dtypes",
    "issubdtype": "answers about dtypes",
    "jvp": "a transformation of functions for training",
    "matrix_norm": "call qg.linalg.norm",
    "result_type": "answers about dtypes",
    "trace": "qg.trace traces a function; write qg.sum(qg.diagonal(x))",
    "value_and_grad": "a transformation of functions for training",
    "vjp": "a transformation of functions for training",
    "vmap": "a transformation of functions; qgraph graphs are batched by hand",
}
