"""Regions on CPUs: bodies as steps of the engine in `qgraph/kernels/cpu`."""
