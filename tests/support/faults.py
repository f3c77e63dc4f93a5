"""Faults that a test plants in a source, which its checks must find."""

from __future__ import annotations

from collections.abc import Callable


def planted(before: str, after: str) -> Callable[[str], str]:
    """What puts a fault into a source, which must have the place for it."""

    def change(text: str) -> str:
        assert before in text
        return text.replace(before, after)

    return change
