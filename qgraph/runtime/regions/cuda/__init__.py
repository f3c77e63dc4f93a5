"""Regions on CUDA: products of few rows, and what stands between them, in one launch.

`held` says which nodes may lie in one, `expressions` are what a number is computed from, `stages`
the phases, which `translate` makes of a body; `source` writes them as CUDA (`loading` what rows
are computed from, `finishing` what becomes of sums), `region` launches them.
The parts that the source is made of are in `qgraph/kernels/cuda`: `phases`, `products`, `pick`,
`routing` and `peers`.
"""
