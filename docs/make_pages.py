"""Run the Python in the pages and write what it prints after it: `python docs/make_pages.py`.

The blocks of a page are one program: a ```python block runs after those above it, and the
```text block right after it, if there is one, holds what it printed, or the error it raised.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any
from unittest.mock import patch

DOCS = Path(__file__).parent
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?P<gap>\n?)(?P<out>```text\n.*?```\n)?", re.S)


def pages() -> list[Path]:
    """Every page that holds Python."""
    found = sorted(DOCS.glob("*.md")) + sorted((DOCS / "guide").glob("*.md"))
    return [path for path in found if "```python\n" in path.read_text()]


@contextlib.contextmanager
def one_machine() -> Iterator[None]:
    """Plans depend on the machine: pages show those of one x86-64 core with nothing tuned."""
    with tempfile.TemporaryDirectory() as empty, contextlib.ExitStack() as stack:
        for where, name, value in (
            (os, "cpu_count", lambda: 1),
            (os, "sched_getaffinity", lambda _: {0}),
            (platform, "machine", lambda: "x86_64"),
        ):
            stack.enter_context(patch.object(where, name, value, create=True))
        stack.enter_context(patch("platformdirs.user_cache_dir", lambda *_: empty))
        yield


def made(path: Path) -> str:
    """The page with the output of its blocks as it is now."""
    text = path.read_text()
    file = f"{path.stem.replace('-', '_')}.py"
    module: dict[str, Any] = {"__name__": "__main__"}
    source = ""

    def replace(match: re.Match[str]) -> str:
        nonlocal source
        code, lines = match["code"], source.count("\n")
        source += code
        # The code above stands in the file too, so that errors and origins find their lines.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        printed = run(compile("\n" * lines + code, file, "exec"), module)
        block = f"```python\n{code}```\n"
        return block if match["out"] is None else f"{block}{match['gap']}```text\n{printed}```\n"

    with one_machine():
        return BLOCK.sub(replace, text)


def run(code: CodeType, module: dict[str, Any]) -> str:
    """What the code prints, an error as the last lines of its traceback."""
    from qgraph import QGraphError

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(code, module)
        except QGraphError as error:
            print(f"{type(error).__name__}: {error}")
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


if __name__ == "__main__":
    stale = []
    for page in pages():
        new = made(page)
        if new != page.read_text():
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new)
    print(f"changed: {', '.join(stale) or 'nothing'}")
    sys.exit(bool(stale) and "--check" in sys.argv)
