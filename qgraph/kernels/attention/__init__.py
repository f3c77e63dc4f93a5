"""Ways to carry out attention."""
