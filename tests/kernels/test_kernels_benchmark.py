"""What `benchmarks.kernels` says when there is nothing to measure."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import kernels

APP = typer.Typer()
APP.command()(kernels.main)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--only", "tild", "--sizes", "64x64"], "--only tild: none applies here"),
        (["--sizes", "64x70"], "no size has a K"),
    ],
)
def test_nothing_to_measure_is_told(options: list[str], why: str) -> None:
    done = CliRunner().invoke(APP, [*options, "--modes", "affine4"])
    assert done.exit_code == 2
    assert why in done.output
