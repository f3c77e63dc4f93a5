"""From a function to a program: the order of passes, plans, programs."""
