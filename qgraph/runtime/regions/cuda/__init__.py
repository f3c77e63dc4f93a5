"""Regions on CUDA: products of few rows, and what stands between them, in one launch.

`expressions` are what a number is computed from, `stages` the phases of a region, `source` writes
them as CUDA, `region` launches them.  The parts that the source is made of are in
`qgraph/kernels/cuda/phases.cuh`.
"""
