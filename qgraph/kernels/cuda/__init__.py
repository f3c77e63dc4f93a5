"""What kernels written in CUDA share."""
