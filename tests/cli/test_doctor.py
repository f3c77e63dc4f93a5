"""`qgraph doctor` finds what there is, and says what is wrong."""

from __future__ import annotations

import io
from pathlib import Path

import mlx.core as mx
import pytest
from rich.console import Console

from qgraph.cli import doctor
from qgraph.target import as_target
from tests.support.compiler import forget_builds, needs_compiler


def run() -> tuple[int, str]:
    out = io.StringIO()
    status = doctor.examine(Console(file=out, width=200))
    return status, out.getvalue()


def test_it_names_versions_devices_and_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    status, text = run()
    assert status == 0
    for word in (mx.__version__, str(as_target()), "/usr/bin/g++", str(tmp_path / "cache")):
        assert word in text


def test_a_missing_compiler_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("shutil.which", lambda name: None)
    status, text = run()
    assert status == 1
    assert "install g++" in text


def test_a_cache_that_cannot_be_written_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    (tmp_path / "kernels.json").write_text("{}")
    (found,) = doctor._caches()
    assert "1 file, 0.0 KiB" in found.found
    assert "cannot be written" in found.wrong


def test_wrong_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "compile", lambda fn: lambda x: fn(x) + 1)
    assert doctor._computes(as_target()).wrong == "the numbers are wrong"


def test_an_unknown_package_is_not_installed() -> None:
    assert doctor._version("no-such-package-here") == "not installed"


@needs_compiler
def test_our_own_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found() -> doctor.Finding:
        return next(f for f in doctor.findings() if f.what.startswith("our kernel"))

    assert (found().found, found().wrong) == ("right", "")
    monkeypatch.setattr("qgraph.kernels.cpu.library.COMPILER", "false")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    forget_builds()
    try:
        first, second = found(), found()
    finally:
        forget_builds()
    assert first.found == second.found == "fails"
    assert "could not be built" in first.wrong
    assert second.wrong
