"""Ways to carry out a product, one a file."""
