"""What kernels written in C++ share: their sources and the library built from them."""
