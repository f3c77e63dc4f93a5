"""Fuzzers for what comes from outside: trees, files, caches, rules, specs and the command line.

    python -m tests.fuzz SURFACE --count 10000 [--seed 7]

Each module makes one surface: cases, and what must hold of each.  CI runs every surface for some
seconds on a seed of the day (`tests/house/test_fuzz.py`); what one finds becomes a test of its own.
"""
