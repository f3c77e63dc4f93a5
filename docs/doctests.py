"""A Griffe extension: doctests in docstrings become blocks of code on the reference page."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


def fenced(text: str) -> str:
    """The text with a fence around each doctest, which ends at an empty line.

    >>> fenced("Adds.\\n\\n>>> 1 + 1\\n2").splitlines()
    ['Adds.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    result: list[str] = []
    inside = False
    for line in text.splitlines():
        if not inside and line.startswith(">>>"):
            result.append("```pycon")
            inside = True
        elif inside and not line:
            result.append("```")
            inside = False
        result.append(line)
    return "\n".join([*result, "```"] if inside else result)


class Doctests(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
