"""What takes long the first time says what it does and how far it is, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

PATIENCE = 2.0
"""Seconds before the first word and between words, where nobody watches a terminal."""


@contextmanager
def progress(
    what: str, total: int, *, patience: float = PATIENCE, file: TextIO | None = None
) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each of `total` parts.

    Nothing is written of what is done within `patience` seconds.  A terminal has one line, which is
    written over; anything else a line now and then.

    Args:
        what: such as "packing weights".
        file: by default standard error, as it is when the work begins.

    >>> with progress("building kernels", 2, patience=0, file=sys.stdout) as done:
    ...     done()
    ...     done()
    qgraph: building kernels, 1 of 2
    qgraph: building kernels, 2 of 2
    """
    out = sys.stderr if file is None else file
    watched = out is not None and out.isatty()
    begun = last = time.monotonic()
    count, spoken = 0, False

    def done() -> None:
        nonlocal count, last, spoken
        count, now = count + 1, time.monotonic()
        if now - begun < patience or (not watched and now - last < patience and count < total):
            return
        last, spoken = now, True
        end = "\r" if watched and count < total else "\n"
        print(f"qgraph: {what}, {count} of {total}", end=end, file=out, flush=True)

    try:
        yield done
    finally:
        if spoken and watched and count < total:
            print(file=out, flush=True)
