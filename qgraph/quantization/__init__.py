"""Quantizing: the checked calls, which weights, rounding."""
