"""Fitting a `Quantize` to a graph and to data: the best numbers and bits for the bytes."""

from ..quantization.config import set_fitter
from .fit import fit

set_fitter(fit)

__all__ = ["fit"]
