"""What takes long says what it does and how far it is, once it has taken long."""

from __future__ import annotations

import io

import pytest

from qgraph.kernels.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_done_at_once_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("packing weights", 3) as done:
        for _ in range(3):
            done()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_one_line() -> None:
    file = Terminal()
    with progress("packing weights", 3, patience=0, file=file) as done:
        for _ in range(3):
            done()
    words = file.getvalue()
    assert words.count("\r") == 2
    assert words.endswith("qgraph: packing weights, 3 of 3\n")


def test_what_fails_midway_leaves_the_line() -> None:
    file = Terminal()

    def build() -> None:
        with progress("building", 3, patience=0, file=file) as done:
            done()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build()
    assert file.getvalue() == "qgraph: building, 1 of 3\r\n"


def test_a_file_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, *(0.5 * i for i in range(1, 21))])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    file = io.StringIO()
    with progress("packing weights", 20, file=file) as done:
        for _ in range(20):
            done()
    assert file.getvalue().splitlines() == [
        f"qgraph: packing weights, {n} of 20" for n in (4, 8, 12, 16, 20)
    ]
