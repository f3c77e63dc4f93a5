"""mlx-lm's caches: how each class goes into a program, what a trace sees, how it comes out."""
