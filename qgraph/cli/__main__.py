"""`python -m qgraph.cli` is the `qgraph` command."""

from . import main

if __name__ == "__main__":
    main()
