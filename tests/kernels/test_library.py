"""The library of CPU kernels in the user's cache: one that was damaged is built again."""

from __future__ import annotations

from pathlib import Path

import pytest

from qgraph.kernels.cpu import library

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where the library lies, after a build that compiles nothing; grows with each build."""
    builds: list[Path] = []

    def compiled(texts: dict[str, bytes], folder: Path) -> Path:
        assert texts
        made = folder / "kernels.so"
        made.write_bytes(CONTENT)
        builds.append(made)
        return made

    monkeypatch.setattr(library, "_compiled", compiled)
    monkeypatch.setattr(library, "_folder", lambda: tmp_path / "cache")
    library._built()
    return builds


def test_it_is_built_once(built: list[Path]) -> None:
    place = library._built()
    assert len(built) == 1
    assert place.read_bytes().startswith(CONTENT)


@pytest.mark.parametrize("keep", [0, 1, 5000, len(CONTENT), -1])
def test_one_that_was_cut_off_is_built_again(built: list[Path], keep: int) -> None:
    """Loading it would end the process with SIGBUS, at every start."""
    place = library._built()
    whole = place.read_bytes()
    place.write_bytes(whole[:keep])
    assert library._built().read_bytes() == whole
    assert len(built) == 2


@pytest.mark.parametrize("at", [0, 5000, -1])
def test_one_that_was_changed_is_built_again(built: list[Path], at: int) -> None:
    place = library._built()
    whole = place.read_bytes()
    changed = bytearray(whole)
    changed[at] ^= 1
    place.write_bytes(changed)
    assert library._built().read_bytes() == whole


def test_a_folder_in_its_place_is_said(built: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    place = library._built()
    place.unlink()
    place.mkdir()
    (place / "file").write_text("")
    library.library.cache_clear()
    with pytest.warns(UserWarning, match="could not be built"):
        assert library.library() is None
    library.library.cache_clear()
