"""Products of a weight laid out in tiles, on CUDA: decision 0014 tells how they came about."""
