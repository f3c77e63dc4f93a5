"""A graph run on data, forward and backward, and what is learned at its products."""
