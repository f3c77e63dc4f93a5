"""Regions carried out natively: what all back ends share, and the back end for CPUs.

`arrays` are values as strided views of buffers, `steps` what is done to them, `phases` puts steps
in order, `memory` puts buffers in one arena.  `cpu` translates a region's body to steps and runs
them by the engine of `qgraph/kernels/cpu`.
"""
