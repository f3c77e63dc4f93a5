"""Any MLX function or `nn.Module` as a graph, through `mx.export_function`.

The callback form of the export hands the function's graph over primitive by primitive; each becomes
ops of the table (`primitives.py`).
"""

from .functions import call, from_mlx

__all__ = ["call", "from_mlx"]
