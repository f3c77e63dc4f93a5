"""Benchmarks, one command each: `python -m benchmarks.NAME` prints a table of ratios."""
