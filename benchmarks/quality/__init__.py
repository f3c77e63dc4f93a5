"""How good models are at a number of bytes: `python -m benchmarks.quality`."""
