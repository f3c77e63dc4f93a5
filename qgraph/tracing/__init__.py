"""Building graphs by calling functions on symbolic tensors."""
