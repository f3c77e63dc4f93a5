"""Choosing a kernel: costs, shipped tables, measurements and their cache."""
