"""Ways of rounding a matrix, on arrays of NumPy or MLX alone: grids, GPTQ, further visits."""
