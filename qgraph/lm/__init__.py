"""Models of mlx-lm, generating through programs."""

from .accelerate import accelerate

__all__ = ["accelerate"]
