"""Models of mlx-lm, generating through programs; needs mlx-lm, the extra `lm`."""

try:
    import mlx_lm.models.cache as _needed
except ImportError as error:
    raise ImportError(
        f"qgraph.lm needs mlx-lm: pip install 'qgraph[lm]'.  It said: {error}"
    ) from error
del _needed

from .accelerate import accelerate
from .load import load
from .quantize import quantize

__all__ = ["accelerate", "load", "quantize"]
