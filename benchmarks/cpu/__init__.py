"""Models on a CPU: programs against MLX, llama.cpp and PyTorch; `python -m benchmarks.cpu`."""
