"""Programs that show qgraph at work; each module runs with ``python -m qgraph.examples.NAME``."""
