"""Running a graph: interpreted, packed, lowered to compiled stretches, written to files."""
